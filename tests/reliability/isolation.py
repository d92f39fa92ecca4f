"""Random calls on many memories of one store, held against memories that were never in one."""

from __future__ import annotations

import random
import tempfile

import numpy as np

import perdure

from .workload import QUICK, STORES

KINDS = {
    "knn": {"rows": 3, "heads": 2, "dim": 4, "capacity": 50, "clip": None},
    "continuous": {"rows": 3, "dim": 4, "basis": 8, "samples": 16},
}
CLASSES = {"knn": perdure.KNNMemory, "continuous": perdure.ContinuousMemory}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def isolation(count, seed, under="durable"):
    """`count` calls: writes to some rows, clears, deletes, commits, checkpoints, reopening with a commit or without."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    names = [f"name {i}" for i in range(8)]
    live, committed, owners, done = {}, {}, {}, {}
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        store = STORES[under](folder + "/store", cache=40_000).store
        for n in range(count):
            name = rng.choice(names)
            call = rng.choices(
                ("write", "clear", "delete", "commit", "checkpoint", "reopen", "crash", "compare", "read"),
                (60, 6, 2, 12, 1, 1, 1, 10, 20),
            )[0]
            done[call] = done.get(call, 0) + 1
            if call in ("write", "clear", "compare", "read"):
                kind = rng.choices(list(KINDS), (5, 1))[0] if name not in live else live[name][0]
                config = KINDS[kind]
                if name not in live:
                    live[name] = kind, CLASSES[kind](**{k: v for k, v in config.items() if k != "clip"})
                memory, twin = store.memory(name, kind=kind, **config), live[name][1]
            match call:
                case "write":
                    rows, length = sorted(rng.sample(range(3), rng.randint(1, 3))), rng.choice((1, 2, 7, 60))
                    owner = owners.setdefault((name, tuple(rows)), len(owners) + 1)
                    for one in (memory, twin):
                        if kind == "knn":
                            keys = np.full((len(rows), 2, length, 4), owner, np.float32)
                            one.write(keys, keys, rows=rows, tags=rows_tags(rows, names.index(name), length))
                        else:
                            one.write(np.full((len(rows), length, 4), owner / 9, np.float32), rows=rows)
                case "clear":
                    rows = rng.choice((None, [0], [1, 2]))
                    memory.clear(rows)
                    twin.clear(rows)
                case "delete" if name in live:
                    store.delete(name)
                    del live[name]
                case "commit" | "checkpoint":
                    store.commit() if call == "commit" else store.checkpoint()
                    committed = {n: (k, m.state_dict()) for n, (k, m) in live.items()}
                case "reopen" | "crash":
                    if call == "reopen":
                        store.commit()
                        committed = {n: (k, m.state_dict()) for n, (k, m) in live.items()}
                    store.close()
                    store = perdure.open(folder + "/store", cache=40_000)
                    live = {n: (k, CLASSES[k].from_state_dict(state)) for n, (k, state) in committed.items()}
                    assert store.names() == sorted(live), f"call {n}, seed {seed}"
                case "compare":
                    assert same(memory, twin), f"call {n}, seed {seed}: {name} is not what was written"
                case "read" if kind == "knn":
                    queries = numbers.standard_normal((3, 2, 2, 4)).astype(np.float32)
                    near = memory.search(queries, k=5)
                    for row in range(3 if near.tags is not None else 0):
                        tags = near.tags[row][near.positions[row] >= 0]
                        wanted = row * 100 + names.index(name)
                        assert (tags == wanted).all(), f"call {n}, seed {seed}: another's token in {name}, row {row}"
        store.commit()
        store.verify()
        for name, (_, twin) in live.items():
            assert same(store.memory(name), twin), f"seed {seed}: {name} at the end"
        store.close()
    return {"calls": count, **done}


def rows_tags(rows, name, length):
    """Every token says which row of which memory it belongs to."""
    return np.repeat(np.array(rows)[:, None] * 100 + name, length, axis=1)
