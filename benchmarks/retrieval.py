"""Retrieval side by side: perdure's indexes beside the libraries one would use otherwise, and beside the product alone.

All take turns in one process on one thread, and CPU time is measured, so that a busy machine slows all alike. A step
is what a memory does for every segment: 512 new keys in, the 512 oldest out, 512 queries. Medians over rounds; ratios
to the float32 product of queries and keys, which every exact method without a trick has to compute. Prints a table, and
keeps it with a picture and a description of the machine in benchmarks/results/.

    nox -s bench -- retrieval --data=clusters,normal,attention --keys=8192,65536 --rounds=7
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

THREADS = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # where set, the product would run below its speed
os.environ.update({name: value for name, value in THREADS.items() if name not in os.environ})
for name in SLOWING:
    os.environ.pop(name, None)

import numpy as np  # noqa: E402  # the variables above are read when it is imported
from _retrieval_data import DATA  # noqa: E402
from _retrieval_engines import Perdure, engines  # noqa: E402

import perdure  # noqa: E402

SEGMENT, K = 512, 32
RESULTS = Path(__file__).parent / "results"


def timed(function: Any, *args: Any) -> tuple[float, Any]:
    started = time.process_time()
    result = function(*args)
    return time.process_time() - started, result


def measure(data: str, n: int, d: int, rounds: int, slow: bool, only: str) -> list[dict[str, Any]]:
    """One row a method: medians in milliseconds of step, search and single search, and the recall of the searches."""
    more = (rounds + 2) * SEGMENT
    keys, queries = DATA[data](n + more, d, np.random.default_rng(0))
    made, exact = engines(keys[:n], slow, only), Perdure(keys[:n])
    times: dict[str, dict[str, list[float]]] = {name: {"insert": [], "search": [], "one": []} for name in made}
    recalls: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds + 2):  # the first two compile, train and tune
        fresh = slice(n + turn * SEGMENT, n + (turn + 1) * SEGMENT)
        exact.step(keys[fresh])
        truth = exact.search(queries[fresh], K)
        for name, engine in made.items():
            insert, _ = timed(engine.step, keys[fresh])
            search, found = timed(engine.search, queries[fresh], K)
            one = statistics.median(timed(engine.search, queries[fresh][i : i + 1], K)[0] for i in range(5))
            if turn >= 2:
                for part, seconds in (("insert", insert), ("search", search), ("one", one)):
                    times[name][part].append(1e3 * seconds)
                if found is not None:
                    recalls[name].append(overlap(found, truth))
    limit = statistics.median(times["float32 product alone"]["search"])
    table = []
    for name in made:
        insert, search, one = (statistics.median(times[name][part]) for part in ("insert", "search", "one"))
        recall = statistics.mean(recalls[name]) if recalls[name] else None
        row = {"data": data, "keys": n, "dim": d, "engine": name, "insert_ms": insert, "search_ms": search}
        table.append({**row, "one_query_ms": one, "recall": recall, "search_to_product": search / limit})
    return table


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((truth[:, :, None] == found[:, None, :]).any(axis=-1).mean())


def show(table: list[dict[str, Any]]) -> str:
    lines, heading = [], None
    for row in table:
        if heading != (heading := (row["data"], row["keys"], row["dim"])):
            lines.append(f"\n{row['data']}, {row['keys']:,} keys of {row['dim']}, {SEGMENT} queries, k = {K}")
            lines.append(f"{'':34}{'insert':>9}{'search':>10}{'one query':>11}{'recall':>8}{'to product':>12}")
        recall = "" if row["recall"] is None else f"{row['recall']:.3f}"
        lines.append(
            f"{row['engine']:34}{row['insert_ms']:9.2f}{row['search_ms']:10.1f}{row['one_query_ms']:11.2f}"
            f"{recall:>8}{row['search_to_product']:12.2f}"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    from perdure.backends.numba import machine as cpu

    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "register_bytes": cpu.register_bytes(),
        "vnni": cpu.dots(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "perdure": perdure.__version__,
        "threads": 1,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Recall against the time of a search, a panel a data set."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["data"], row["keys"]) for row in table))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        for row in table:
            if (row["data"], row["keys"]) == panel and row["recall"] is not None:
                marker = "o" if row["engine"].startswith("perdure") else "x"
                axis.plot(row["search_ms"], row["recall"], marker, label=row["engine"])
        axis.set(xscale="log", xlabel="ms, 512 queries", ylabel="recall", title=f"{panel[0]}, {panel[1]:,} keys")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="clusters,normal", help=f"of {', '.join(DATA)}; attention takes minutes")
    parser.add_argument("--keys", default="8192,65536")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--graphs", action="store_true", help="also hnswlib and usearch, which take long to build")
    parser.add_argument("--only", default="", help="engines by the beginnings of their names")
    parser.add_argument("--keep", default="retrieval", help="name of the files in benchmarks/results/")
    options = parser.parse_args()
    warnings.simplefilter("ignore", perdure.RecallWarning)
    table = []
    for data in options.data.split(","):
        for n in map(int, options.keys.split(",")):
            table += measure(data, n, options.dim, options.rounds, options.graphs, options.only)
            print(show(table[-1:] if len(table) == 1 else [r for r in table if (r["data"], r["keys"]) == (data, n)]))
    RESULTS.mkdir(exist_ok=True)
    report = {"machine": machine(), "segment": SEGMENT, "k": K, "rounds": options.rounds, "results": table}
    (RESULTS / f"{options.keep}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    plot(table, RESULTS / f"{options.keep}.png")


if __name__ == "__main__":
    main()
