"""Exact top-k retrieval: perdure beside what one writes with NumPy or PyTorch, and beside the matrix product alone.

All take turns in one process, so that a noisy machine slows all alike; the median over rounds is shown, and the ratio
to the float32 product of queries and keys, which every method without a trick has to compute.

    nox -s bench -- retrieval --keys=8192,65536 --rounds=7
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import perdure


def product(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """The scores alone: no method that computes them all in float32 is faster."""
    return queries @ keys.T


def numpy_argpartition(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    scores = queries @ keys.T
    best = np.argpartition(-scores, k, axis=-1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, best, axis=-1), axis=-1)
    return np.take_along_axis(best, order, axis=-1)


def torch_topk(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    return torch.topk(torch.from_numpy(queries) @ torch.from_numpy(keys).T, k, dim=-1).indices.numpy()


def perdure_top_k(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    return perdure.top_k(queries, keys, k).positions


METHODS: tuple[Callable[..., np.ndarray], ...] = (product, numpy_argpartition, torch_topk, perdure_top_k)


def measure(n: int, queries: int, dim: int, k: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each method; all must retrieve the same keys, up to rounding at the k-th place."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((queries, dim), np.float32), rng.standard_normal((n, dim), np.float32), k
    found = {method.__name__: method(*data) for method in METHODS}  # compiles, too
    for name in ("torch_topk", "perdure_top_k"):
        same = np.mean(
            [len(np.intersect1d(a, b)) for a, b in zip(found[name], found["numpy_argpartition"], strict=True)]
        )
        if same < 0.999 * k:
            raise SystemExit(f"{name} retrieved {same:.2f} of the {k} that NumPy did")
    times: dict[str, list[float]] = {method.__name__: [] for method in METHODS}
    for _ in range(rounds):
        for method in METHODS:
            start = time.perf_counter()
            method(*data)
            times[method.__name__].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(spent) for name, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact top-k retrieval beside NumPy and PyTorch.")
    parser.add_argument("--keys", default="8192,65536", help="numbers of keys, comma-separated (%(default)s)")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{options.queries} queries, dim {options.dim}, k {options.k}, float32, {torch.get_num_threads()} threads")
    print(f"{'keys':>8}  {'method':20}{'ms':>9}  {'x product':>9}")
    for n in map(int, options.keys.split(",")):
        times = measure(n, options.queries, options.dim, options.k, options.rounds)
        for name, spent in times.items():
            print(f"{n:8}  {name:20}{spent:9.1f}  {spent / times['product']:9.2f}")


if __name__ == "__main__":
    main()
