"""`perdure bench`: how fast exact retrieval is on this machine, beside what NumPy and PyTorch do by themselves."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.attention import attend
from ..core.retrieval import top_k
from ..memory.knn import KNNMemory
from .arguments import whole_number
from .info import processor, threads


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `perdure`."""
    parser = subparsers.add_parser("bench", help="time exact retrieval here, beside NumPy and PyTorch")
    for name, default, what in (
        ("keys", "65536", "keys in memory"),
        ("queries", "512", "queries at once"),
        ("dim", "64", "width of both"),
        ("k", "32", "neighbours of each"),
        ("runs", "5", "times each is run; the median counts"),
    ):
        parser.add_argument(f"--{name}", default=default, metavar="N", help=f"{what} (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run every way in turn, several times, and print medians with their ratio to the first."""
    n, q, d, k, runs = (
        whole_number(f"--{name}", getattr(arguments, name)) for name in ("keys", "queries", "dim", "k", "runs")
    )
    print(f"{n} keys, {q} queries, {d} numbers each, float32, the {k} nearest")
    print(f"{processor()}; {threads()}\n")
    ways = candidates(n, q, d, min(k, n))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # what is compiled or allocated once is not what is asked
    for _ in range(runs):  # in turn, so that a busy moment meets all alike
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    width = max(map(len, medians))
    for name, median in medians.items():
        print(f"{name.ljust(width)}  {1000 * median:9.2f} ms  {median / first:6.2f} x")


def candidates(n: int, q: int, d: int, k: int) -> dict[str, Callable[[], Any]]:
    """What is compared, by name: perdure's ways first, then what one would write without it."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((n, d), dtype=np.float32)
    queries = keys[rng.integers(n, size=q)] + rng.standard_normal((q, d), dtype=np.float32) / 2
    memory = KNNMemory(rows=1, heads=1, dim=d, capacity=n)
    memory.write(keys[None, None], keys[None, None])
    near = top_k(queries, keys, k)

    def argpartition() -> np.ndarray:
        scores = queries @ keys.T
        best = np.argpartition(scores, n - k, axis=1)[:, n - k :]
        return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1)

    ways: dict[str, Callable[[], Any]] = {
        "KNNMemory.search, exact": lambda: memory.search(queries[None, None], k),
        "perdure.top_k": lambda: top_k(queries, keys, k),
        "perdure.attend to the neighbours": lambda: attend(queries, keys, keys, near.positions),
        "NumPy: the product alone": lambda: queries @ keys.T,
        "NumPy: product, argpartition, sort": argpartition,
    }
    if importlib.util.find_spec("torch"):
        import torch

        tensors = torch.from_numpy(queries), torch.from_numpy(keys)
        ways["PyTorch: matmul, topk"] = lambda: torch.topk(tensors[0] @ tensors[1].T, k)
    return ways
