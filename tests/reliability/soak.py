"""A server's day in short: nothing grows that should not."""

from __future__ import annotations

import os
import resource
import tempfile
import time

import numpy as np

import perdure


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def soak(count, seed):
    """`count` seconds of writes, reads, commits, clears and checkpoints on 12 memories, of which few stay open."""
    rng = np.random.default_rng(seed)
    shape = {"kind": "knn", "rows": 1, "heads": 2, "dim": 16, "capacity": 500}
    samples, latencies, rounds, most = [], [], 0, 0.0
    with tempfile.TemporaryDirectory() as folder, perdure.open(folder + "/store", cache=1 << 20) as store:
        for name in range(12):  # full, compiled and warm, before anything is measured
            keys = rng.standard_normal((1, 2, 500, 16)).astype(np.float32)
            memory = store.memory(f"{name}", **shape)
            memory.write(keys, keys)
            memory.read(keys[:, :, :4], k=8)
        store.checkpoint()
        started = time.monotonic()
        while time.monotonic() - started < count:
            name = f"{rng.integers(12)}"
            memory = store.memory(name, **shape)
            keys = rng.standard_normal((1, 2, 200, 16)).astype(np.float32)
            before = time.perf_counter()
            memory.write(keys, keys)
            memory.read(keys[:, :, :4], k=8)
            store.commit()
            latencies.append(time.perf_counter() - before)
            if rounds % 8 == 7:
                store.clear(name)
                store.checkpoint()
                live = sum(2 * 2 * 16 * 4 * int(store.memory(n).tokens[0]) for n in store.names())
                most = max(most, store.stats()["perdure_store_disk_bytes"] / max(live, 1 << 20))
                samples.append((resident(), len(os.listdir("/proc/self/fd"))))
            rounds += 1
        turnovers = rounds * 200 / 12 / 500
        memory = store.memory("0", **shape)
        keys = memory.state_dict()["rows.0.keys"][None]
        fresh = perdure.KNNMemory(rows=1, heads=2, dim=16, capacity=500)
        fresh.write(keys, keys)
        queries = rng.standard_normal((1, 2, 32, 16)).astype(np.float32)
        found, wanted = (np.sort(m.search(queries, k=8).scores) for m in (memory, fresh))
        recall = float(np.isclose(found, wanted, atol=1e-5).mean())
    half = len(samples) // 2
    first, second = np.array(samples[1:half]), np.array(samples[half:])
    growth = float(np.median(second[:, 0]) / np.median(first[:, 0]) - 1) if half > 2 else 0.0
    seen = {"rounds": rounds, "turnovers": round(turnovers, 1), "memory growth": round(growth, 4)}
    assert growth < 0.02, f"memory grew by {growth:.1%}"
    assert len({descriptors for _, descriptors in samples[1:]}) <= 1, "file descriptors are not constant"
    assert most < 3, f"{most:.1f} times the live bytes on the disk"
    assert recall >= 0.95, f"recall {recall}"
    middle = len(latencies) // 2
    p99 = [float(np.quantile(part, 0.99)) for part in (latencies[:middle], latencies[middle:])]
    seen |= {"disk / live": round(most, 2), "recall of a fresh build": round(recall, 3)}
    return seen | {"p99 ms": round(p99[1] * 1e3, 1), "p99 growth": round(p99[1] / p99[0] - 1, 3)}
