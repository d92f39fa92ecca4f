"""`perdure search`: the nearest keys of every query, exact, from CSV or NPY files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.errors import ShapeError
from ..core.retrieval import SPACES, Neighbours, top_k
from .arguments import file_to_write, whole_number
from .samples import read_samples

SHOWN = 5  # queries, and neighbours of each


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `perdure`."""
    parser = subparsers.add_parser("search", help="find the nearest keys of every query, exactly")
    parser.add_argument("keys", help="one key a row: CSV (a header is skipped), or NPY of shape (n, d)")
    parser.add_argument("queries", help="one query a row, as wide as the keys")
    parser.add_argument("--k", default="32", help="how many neighbours of each (%(default)s)")
    parser.add_argument("--space", default="ip", choices=SPACES, help="what near means (%(default)s)")
    parser.add_argument("--out", metavar="NPZ", help="save scores and positions, (q, k) each, best first")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Search, print the first few neighbours, and save them all if asked to."""
    k = whole_number("--k", arguments.k)
    file_to_write("--out", arguments.out)
    keys, queries = (read_samples(name, Path(getattr(arguments, name))) for name in ("keys", "queries"))
    if keys.shape[1] != queries.shape[1]:
        expected = f"rows of {keys.shape[1]} numbers, as in {arguments.keys}"
        raise ShapeError("queries", expected, f"{arguments.queries} with {queries.shape[1]}", "Check the files.")
    start = time.perf_counter()
    near = top_k(queries, keys, min(k, len(keys)), arguments.space)
    seconds = time.perf_counter() - start
    print(f"{len(queries)} queries among {len(keys)} keys of {keys.shape[1]} numbers in {seconds:.2f} s")
    print(listing(near))
    if arguments.out:
        with open(arguments.out, "wb") as target:
            np.savez(target, scores=near.scores, positions=near.positions)
        print(f"scores and positions saved: {arguments.out}")


def listing(near: Neighbours) -> str:
    """The best neighbours of the first queries: row of the key, and its score."""
    lines = ["query  nearest keys (row: score)"]
    for query, (positions, scores) in enumerate(zip(near.positions[:SHOWN], near.scores[:SHOWN], strict=True)):
        best = zip(positions[:SHOWN], scores[:SHOWN], strict=True)
        lines.append(f"{query:5}  " + "  ".join(f"{position}: {score:.4g}" for position, score in best))
    return "\n".join(lines)
