"""Steps that follow from their number alone, and what each leaves, computed without a store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os

import numpy as np

import perdure

QUICK = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where a flush costs nothing; what is flushed, `trace` sees
NAMES = ("ada", "bob", "../eve")
CONFIG = {"rows": 2, "heads": 2, "dim": 8, "capacity": 300}


def segment(step):
    """Keys (2, 2, n, 8) of the step; now and then so large that they lie in the file of bodies."""
    n = 400 if step % 7 == 3 else 1 + step % 5
    return np.full((2, 2, n, 8), step + 1, np.float32) + np.arange(n, dtype=np.float32)[:, None] / 1024


def do(step, memory, delete):
    """The calls of one step; `memory(name)` gives or makes one, `delete(name)` deletes it."""
    name = NAMES[step % 3]
    match step % 11:
        case 5:
            memory(name).clear([step % 2])
        case 8:
            memory(name).clear()
        case 9:
            memory(name)
            delete(name)
        case _:
            keys = segment(step)
            memory(name).write(keys, keys, tags=step)
            memory(NAMES[(step + 1) % 3]).write(keys[:1, :, :1], keys[:1, :, :1], rows=[step % 2])


def fingerprint(memories):
    """A hash of memories by name."""
    digest = hashlib.sha256()
    for name in sorted(memories):
        for part, array in sorted(memories[name].state_dict().items()):
            digest.update(f"{name} {part} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


class Expected:
    """Fingerprints of all memories after every step."""

    def __init__(self):
        self.memories, self.after, self.parts = {}, [fingerprint({})], [{}]

    def __getitem__(self, step):
        while len(self.after) <= step:
            do(len(self.after) - 1, self._memory, self.memories.pop)
            self.after.append(fingerprint(self.memories))
            self.parts.append({name: fingerprint({name: memory}) for name, memory in self.memories.items()})
        return self.after[step]

    def names(self, step):
        """The names of all memories after a step, sorted."""
        self[step]
        return sorted(self.parts[step])

    def part(self, step, name):
        """The fingerprint of one memory after a step; None where there is none."""
        self[step]
        return self.parts[step].get(name)

    def _memory(self, name):
        return self.memories.setdefault(name, perdure.KNNMemory(**CONFIG))


class Durable:
    """The store under test."""

    def __init__(self, path, **options):
        self.breaks()
        self.store = perdure.open(path, **options)

    @staticmethod
    def breaks():
        """What is wrong with it: here nothing."""

    def memory(self, name):
        return self.store.memory(name, kind="knn", clip=None, **CONFIG)

    def delete(self, name):
        self.store.delete(name)

    def commit(self):
        self.store.commit()

    def checkpoint(self):
        self.store.checkpoint()

    def found(self):
        self.store.verify()
        return {name: self.store.memory(name) for name in self.store.names()}

    def close(self):
        self.store.close()


class Naive:
    """A store as one might write it in an afternoon: np.savez over the old file. It must not pass."""

    def __init__(self, path):
        os.makedirs(path, exist_ok=True)
        self.path, self.memories = os.path.join(path, "all.npz"), {}
        if os.path.exists(self.path):
            with np.load(self.path) as arrays:
                for name in json.loads(bytes(arrays["names"])):
                    state = {key[len(name) + 1 :]: arrays[key] for key in arrays if key.startswith(name + "|")}
                    self.memories[name] = perdure.KNNMemory.from_state_dict(state)

    def memory(self, name):
        return self.memories.setdefault(name, perdure.KNNMemory(**CONFIG))

    def delete(self, name):
        del self.memories[name]

    def commit(self):
        states = {f"{n}|{key}": a for n, m in self.memories.items() for key, a in m.state_dict().items()}
        np.savez(self.path, names=np.frombuffer(json.dumps(list(self.memories)).encode(), np.uint8), **states)

    def checkpoint(self):
        self.commit()

    def found(self):
        return self.memories

    def close(self):
        pass


class Forgetful(Durable):
    """The store, but nothing is flushed to the disk. It must not pass."""

    @staticmethod
    def breaks():
        from perdure.memory import bodies, schema

        bodies._flush = lambda descriptor: None
        schema.PRAGMAS = tuple(p if "synchronous" not in p else "synchronous = OFF" for p in schema.PRAGMAS)


class Trusting(Durable):
    """The store, but checksums always match. It must not pass."""

    @staticmethod
    def breaks():
        from perdure.memory import engine, file, ledger

        ledger.link = lambda *anything: bytes(32)
        engine.row_digest = ledger.row_digest = lambda *anything: bytes(32)
        file._compare = lambda *anything: None


class Leaky(Durable):
    """The store, but what is cleared stays. It must not pass."""

    @staticmethod
    def breaks():
        from perdure.memory.guard import Guard

        Guard.clear = lambda self, rows=None: None


class Unlocked(Durable):
    """The store, but readers and writers of a memory do not wait for one another. It must not pass."""

    @staticmethod
    def breaks():
        from perdure.memory import lock

        for side in (lock._Reading, lock._Writing):
            side.__enter__ = side.__exit__ = lambda self, *anything: None


class Obliging(Durable):
    """The store, but whatever lies in a file's place is taken for a file. It must not pass."""

    @staticmethod
    def breaks():
        from perdure.memory import bodies, disk, engine, writer

        for module in (bodies, disk, engine, writer):
            module.refuse_odd = lambda path, missing_ok=False: None


class Hoarding(Durable):
    """The store, but what was overwritten is kept. It must not pass."""

    @staticmethod
    def breaks():
        from perdure.memory.catalogue import Catalogue

        Catalogue.outgrown = Catalogue.compactable = staticmethod(lambda *anything: False)


STORES = {
    "durable": Durable,
    "naive": Naive,
    "forgetful": Forgetful,
    "trusting": Trusting,
    "leaky": Leaky,
    "unlocked": Unlocked,
    "obliging": Obliging,
    "hoarding": Hoarding,
}


def work(store, start, told, stop=None):
    """Steps from `start` on, each committed and, once it is, told; every ninth with a checkpoint."""
    step = start
    while step != stop:
        with contextlib.suppress(perdure.QuotaError):
            do(step, store.memory, store.delete)
        step += 1
        store.checkpoint() if step % 9 == 0 else store.commit()
        told(step)
