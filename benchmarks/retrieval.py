"""Retrieval side by side: perdure's indexes beside the libraries one would use otherwise, and beside the product alone.

All take turns in one process on one thread, and CPU time is measured, so that a busy machine slows all alike. A step
is what a memory does for every segment: 512 new keys in, the 512 oldest out, 512 queries, attention over what they
found: perdure's as its memory reads, that of the others by one function. Medians over rounds; ratios to the float32
product of queries and keys, which every exact method without a trick has to compute. With --threads above 1 wall time
is measured. With --turnovers everything is replaced so many times before, in segments, and indexes made anew over the
same keys stand beside the others. With --sealed nothing is written once all is there, and hnswlib searches the very
graph that perdure does.
Prints a table, and keeps it with a picture and a description of the machine in benchmarks/results/.

    nox -s bench -- retrieval --data=clusters,normal,attention --keys=8192,65536 --rounds=7
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

THREADS = next((word.partition("=")[2] for word in sys.argv if word.startswith("--threads=")), "1")
SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # where set, the product would run below its speed
os.environ.update({f"{name}_NUM_THREADS": THREADS for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")})
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "4"}  # who is done does not spin on
for name in SLOWING:
    os.environ.pop(name, None)

import numpy as np  # noqa: E402  # the variables above are read when it is imported
from _machine import processor  # noqa: E402
from _retrieval_data import DATA  # noqa: E402
from _retrieval_engines import Perdure, Ring, SameGraph, engines  # noqa: E402

import perdure  # noqa: E402

SEGMENT, K = 512, 32
RESULTS = Path(__file__).parent / "results"


def timed(function: Any, *args: Any) -> tuple[float, Any]:
    clock = time.process_time if THREADS == "1" else time.perf_counter
    started = clock()
    result = function(*args)
    return clock() - started, result


PARTS = ("insert", "search", "attend", "one")
WARM = 8  # rounds that compile, train, audit often and tune, and do not count


def measure(data: str, n: int, d: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a method: medians in milliseconds of the parts of a step, and the recall of the searches."""
    rounds = options.rounds + WARM
    past = options.turnovers * n
    keys, queries = DATA[data](past + n + rounds * SEGMENT, d, np.random.default_rng(0))
    made = followed(keys, queries, n, past, options)
    ring, exact = Ring(keys[past : past + n]), Perdure(keys[past : past + n])
    times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in made}
    recalls: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        fresh = slice(past + n + turn * SEGMENT, past + n + (turn + 1) * SEGMENT)
        new = slice(0, 0) if options.sealed else fresh
        for each in (ring, exact):
            each.step(keys[new])
        truth = exact.search(queries[fresh], K)
        for name, engine in made.items():
            insert, _ = timed(engine.step, keys[new])
            search, found = timed(engine.search, queries[fresh], K)
            attend = 0.0
            if found is not None:
                if isinstance(engine, Perdure):
                    attend, _ = timed(engine.attend, queries[fresh])
                else:
                    attend, _ = timed(perdure.attend, queries[fresh], ring.keys, ring.keys, found)
            one = statistics.median(timed(engine.search, queries[fresh][i : i + 1], K)[0] for i in range(5))
            if turn >= WARM:
                for part, seconds in zip(PARTS, (insert, search, attend, one), strict=True):
                    times[name][part].append(1e3 * seconds)
                if found is not None:
                    recalls[name].append(overlap(found, truth))
    limit = statistics.median(times["float32 product alone"]["search"])
    table = []
    for name in made:
        insert, search, attend, one = (statistics.median(times[name][part]) for part in PARTS)
        recall = statistics.mean(recalls[name]) if recalls[name] else None
        row = {"data": data, "keys": n, "dim": d, "engine": name, "insert_ms": insert, "search_ms": search}
        row |= {"attend_ms": attend, "step_ms": insert + search + attend, "one_query_ms": one}
        bytes_a_key = made[name].memory.nbytes / n if isinstance(made[name], Perdure) else None
        table.append({**row, "recall": recall, "search_to_product": search / limit, "bytes_a_key": bytes_a_key})
    return table


def followed(keys: np.ndarray, queries: np.ndarray, n: int, past: int, options: argparse.Namespace) -> dict[str, Any]:
    """The engines over the n keys before `past` + n, which reached them through all keys before."""
    made = engines(keys[:n], options.graphs, options.only)
    if options.sealed and "perdure hnsw" in made:
        made["hnswlib, the same graph"] = SameGraph(made["perdure hnsw"])
    for first in range(n, n + past, SEGMENT):
        for engine in made.values():
            engine.step(keys[first : first + SEGMENT])
            engine.search(queries[first : first + 4], K)
    if past:
        anew = engines(keys[past : past + n], options.graphs, options.only)
        made |= {f"{name}, anew": engine for name, engine in anew.items() if name != "float32 product alone"}
    return made


def starting() -> dict[str, float]:
    """Seconds that a process takes to import, write 512 keys and search them: with nothing compiled yet, and again."""
    program = (
        "import time; started = time.perf_counter()\n"
        "import numpy as np, perdure\n"
        "memory = perdure.KNNMemory(1, 1, 64, 65536)\n"
        "keys = np.random.default_rng(0).standard_normal((1, 1, 512, 64)).astype('f')\n"
        "memory.write(keys, keys); memory.read(keys, 32); print(time.perf_counter() - started)"
    )
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-c", program]
        given = {**os.environ, "NUMBA_CACHE_DIR": folder}
        first, second = (
            float(subprocess.run(run, env=given, capture_output=True, text=True, check=True).stdout) for _ in range(2)
        )
    return {"first_process_s": first, "second_process_s": second}


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((truth[:, :, None] == found[:, None, :]).any(axis=-1).mean())


def show(table: list[dict[str, Any]]) -> str:
    lines, heading = [], None
    for row in table:
        if heading != (heading := (row["data"], row["keys"], row["dim"])):
            lines.append(f"\n{row['data']}, {row['keys']:,} keys of {row['dim']}, {SEGMENT} queries, k = {K}")
            heads = ("insert", "search", "attend", "step", "one query", "recall", "to product", "bytes/key")
            lines.append(f"{'':36}" + "".join(f"{head:>11}" for head in heads))
        recall = "" if row["recall"] is None else f"{row['recall']:.3f}"
        lines.append(
            f"{row['engine']:36}{row['insert_ms']:11.2f}{row['search_ms']:11.1f}{row['attend_ms']:11.2f}"
            f"{row['step_ms']:11.1f}{row['one_query_ms']:11.2f}{recall:>11}{row['search_to_product']:11.2f}"
            + (f"{row['bytes_a_key']:11.0f}" if row["bytes_a_key"] else "")
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    from perdure.backends.numba import machine as cpu

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "register_bytes": cpu.register_bytes(),
        "vnni": cpu.dots(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "perdure": perdure.__version__,
        "threads": int(THREADS),
        "clock": "CPU time" if THREADS == "1" else "wall time",
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
    parser.add_argument("--turnovers", type=int, default=0, help="how often everything is replaced before")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", action="store_true", help="also how long a process takes to its first result")
    parser.add_argument("--graphs", action="store_true", help="also graphs, which take long to build")
    parser.add_argument("--sealed", action="store_true", help="nothing is written after the start")
    parser.add_argument("--only", default="", help="engines by the beginnings of their names")
    parser.add_argument("--keep", default="retrieval", help="name of the files in benchmarks/results/")
    options = parser.parse_args()
    warnings.simplefilter("ignore", perdure.RecallWarning)
    table = []
    for data in options.data.split(","):
        for n in map(int, options.keys.split(",")):
            table += measure(data, n, options.dim, options)
            print(show(table[-1:] if len(table) == 1 else [r for r in table if (r["data"], r["keys"]) == (data, n)]))
    RESULTS.mkdir(exist_ok=True)
    report = {"machine": machine(), "segment": SEGMENT, "k": K, "rounds": options.rounds, "results": table}
    report |= {"turnovers": options.turnovers, "sealed": options.sealed} | (
        {"starting": starting()} if options.start else {}
    )
    (RESULTS / f"{options.keep}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    plot(table, RESULTS / f"{options.keep}.png")


if __name__ == "__main__":
    main()
