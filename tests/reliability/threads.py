"""One thread writes a memory of a store, one commits, fourteen read: whole writes or none, in real time's order."""

from __future__ import annotations

import tempfile
import threading
import time

import numpy as np

from .workload import QUICK, STORES

SEGMENT, READERS = 16, 14


def threads(count, seed, under="durable"):
    """`count` seconds of 16 threads; every reader checks each answer against when it asked."""
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        store = STORES[under](folder + "/store").store
        memory = store.memory("a", kind="knn", rows=2, heads=2, dim=16, capacity=1000, clip=None)
        seen = crowd(store, memory, count, seed)
        store.commit()
        before = memory.state_dict()
        store.close()
        store = STORES[under](folder + "/store").store
        after = store.memory("a").state_dict()
        store.close()
        assert all(np.array_equal(before[name], after[name]) for name in before), "reopened, it is another"
    return {"seconds": count, **seen}


def crowd(store, memory, count, seed):
    """All sixteen at once, for `count` seconds."""
    rng = np.random.default_rng(seed)
    memory.search(rng.standard_normal((2, 2, 1, 16)), k=2)
    stop, failures = time.monotonic() + count, []
    begun, ended, reads, commits = [0], [0], [0] * READERS, [0]

    def key(position):
        """The key of a token follows from its position, so that a torn write is seen."""
        return np.sin(np.arange(1, 17) * (position + 1)[..., None]).astype(np.float32)

    def write():
        while time.monotonic() < stop and not failures:
            positions = np.arange(begun[0], begun[0] + SEGMENT)
            keys = np.broadcast_to(key(positions), (2, 2, SEGMENT, 16))
            begun[0] += SEGMENT
            memory.write(keys, keys, tags=np.broadcast_to(positions, (2, SEGMENT)))
            ended[0] = begun[0]
            time.sleep(0.0005)

    def commit():
        while time.monotonic() < stop and not failures:
            commits[0] += 1
            store.checkpoint() if commits[0] % 20 == 0 else store.commit()
            time.sleep(0.002)

    def read(number):
        own = np.random.default_rng((seed, number))
        while time.monotonic() < stop and not failures:
            before = ended[0]
            queries = own.standard_normal((2, 2, 3, 16)).astype(np.float32)
            near = memory.search(queries, k=4)
            after, at = begun[0], near.positions
            found = at >= 0
            if near.tags is None:
                assert not before, "nothing, after a write"
                continue
            assert at.max() < after, "a token before it was written"
            if before:
                assert found.any(), "nothing, after a write"
                assert at[found].min() >= before - 1000, "a token that had left"
            assert (near.tags[found] == at[found]).all(), "another token's tag"
            assert np.array_equal(near.keys[found], key(at[found])), "another token's key, or half a write"
            scores = np.einsum("rhqd,rhqkd->rhqk", queries, near.keys)
            assert np.allclose(scores[found], near.scores[found], atol=1e-4), "a score of something else"
            tokens = memory.tokens
            assert tokens[0] % SEGMENT == 0 or tokens[0] == 1000, "half a segment"
            state = memory.state_dict() if reads[number] % 50 == 0 else None
            assert state is None or state["written"][0] == state["written"][1], "one row before the other"
            reads[number] += 1

    def guarded(action, *args):
        try:
            action(*args)
        except BaseException as error:
            failures.append(error)

    pool = [threading.Thread(target=guarded, args=(action,)) for action in (write, commit)]
    pool += [threading.Thread(target=guarded, args=(read, i)) for i in range(READERS)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert failures == [], failures[0]
    assert min(reads) > 0
    return {"writes": ended[0] // SEGMENT, "reads": sum(reads), "commits": commits[0]}
