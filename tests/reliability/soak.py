"""A server's day in short: nothing grows that should not, and what is found stays as good as in a memory made anew."""

from __future__ import annotations

import os
import resource
import tempfile
import time

import numpy as np

import perdure

from .workload import STORES

NAMES = [f"{i}" for i in range(12)]
SHAPE = {"rows": 1, "heads": 2, "dim": 16, "capacity": 500}
INDEXED = SHAPE | {"capacity": 6000, "index": "ivf"}  # more keys than are searched exactly
TOKENS, NEW = 200, 400  # written in a round, to one of the twelve and to the indexed one
ROUNDS = 320  # at least: ten turnovers of the twelve, and twenty of the indexed one
PACE = 4  # rounds a second, where that is more than ROUNDS in all: a server's load, under which hours can be spent
PATIENCE = 60  # seconds more, while calls seem to take longer: of few, a neighbour delays the one in a hundred
WARM = 0.2  # of the rounds, in which files, caches and the allocator reach their size


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def soak(count, seed, under="durable"):
    """`count` seconds of writes, reads, commits, clears and checkpoints on 13 memories, of which few stay open."""
    rng = np.random.default_rng(seed)
    samples, spent, most = [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        store = STORES[under](folder + "/store", cache=3 << 20).store
        for name, shape in [(name, SHAPE) for name in NAMES] + [("indexed", INDEXED)]:  # full before it is measured
            keys = drawn(rng, shape["capacity"])
            memory = store.memory(name, kind="knn", **shape)
            memory.write(keys, keys)
            memory.read(drawn(rng, 4), k=8)
        store.checkpoint()
        started = time.monotonic()
        while (
            (passed := time.monotonic() - started) < count
            or len(spent) < ROUNDS
            or (passed < count + PATIENCE and growth(np.array(spent)[:, 1], 0.99) >= 0.2)
        ):
            name, keys, more = NAMES[rng.integers(12)], drawn(rng, TOKENS), drawn(rng, NEW)
            queries = drawn(rng, 32)  # as at the end: an index learns from what it is asked
            clocks = time.perf_counter(), time.process_time()
            for memory, new in ((store.memory(name), keys), (store.memory("indexed"), more)):
                memory.write(new, new)
                memory.read(queries, k=8)
            store.commit()
            spent.append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
            time.sleep(max(0, started + len(spent) / PACE - time.monotonic() if count * PACE > ROUNDS else 0))
            if len(spent) % 8 == 0:
                store.clear(name)
                store.checkpoint()
                live = sum(2 * 2 * 16 * 4 * int(store.memory(n).tokens[0]) for n in store.names())
                most = max(most, store.stats()["perdure_store_disk_bytes"] / live)
                assert most < 3, f"{most:.1f} times the live bytes on the disk after {len(spent)} rounds"
                samples.append((resident(), len(os.listdir("/proc/self/fd"))))
        recall = as_found(store.memory("indexed"), rng)
        store.close()
    (memory, descriptors), (wall, work) = np.array(samples, float).T, np.array(spent).T
    turnovers = len(spent) * TOKENS / (12 * SHAPE["capacity"]), len(spent) * NEW / INDEXED["capacity"]
    seen = {
        "rounds": len(spent),
        "turnovers": [round(n, 1) for n in turnovers],
        "memory growth": growth(memory, 0.5),
        "descriptors": [int(descriptors.min()), int(descriptors.max())],
        "disk / live": round(most, 2),
        "recall": recall,
        "p99 ms": round(1e3 * float(np.quantile(wall, 0.99)), 1),
        "p99 growth": growth(wall, 0.99),
        "p99 growth of the work": growth(work, 0.99),  # in processor time, which neighbours disturb less
    }
    assert min(turnovers) > 10, seen
    assert seen["memory growth"] < 0.02, f"memory grew: {seen}"
    assert descriptors[1:].min() == descriptors[1:].max(), f"file descriptors are not constant: {seen}"
    assert recall["then"] >= 0.95 * recall["fresh"], f"less is found than when made anew: {seen}"
    assert seen["p99 growth of the work"] < 0.2, f"calls take longer and longer: {seen}"
    return seen


def drawn(rng, tokens):
    return rng.standard_normal((1, 2, tokens, 16)).astype(np.float32)


def growth(values, quantile):
    """How much more a quantile of the last half is than that of the first, the warm-up left out."""
    kept = values[int(WARM * len(values)) :]
    first, last = (np.quantile(half, quantile) for half in np.array_split(kept, 2))
    return round(float(last / first - 1), 4)


def as_found(memory, rng):
    """Share of the eight nearest found by the aged memory, and by one made anew; both after 64 searches."""
    keys = memory.state_dict()["rows.0.keys"][None]
    fresh, exact = (perdure.KNNMemory(**{**INDEXED, "index": index}) for index in ("ivf", "exact"))
    fresh.write(keys, keys)
    exact.write(keys, keys)
    for _ in range(64):
        queries = drawn(rng, 32)
        for one in (memory, fresh):
            one.search(queries, k=8)
    queries = drawn(rng, 256)
    true, *found = (np.sort(one.search(queries, k=8).scores) for one in (exact, memory, fresh))
    then, anew = (round(float(np.isclose(scores, true, atol=1e-5).mean()), 3) for scores in found)
    return {"then": then, "fresh": anew}
