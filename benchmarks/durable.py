"""What durability costs: a commit beside a plain file, a mapped gigabyte, a saved file beside the safetensors library.

All take turns in one process, so that a noisy machine slows all alike; what is compared is the ratio. The plain file is
written anew each time and flushed; the library's file is flushed too, which it does not do by itself.

    nox -s bench -- durable --rounds=40 --mebibytes=256
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy

import perdure

TOKENS, HEADS, DIM = 512, 8, 64  # one segment: 2 MiB of keys and values


def timed(action: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def flushed(path: Path, content: bytes) -> None:
    """Write a file and flush it."""
    with open(path, "wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())


def commits(folder: Path, rounds: int) -> dict[str, float]:
    """Commits of one segment each, beside a new file of the same bytes, and beside appending them to one file."""
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((1, HEADS, TOKENS, DIM)).astype(np.float32) for _ in range(2))
    content = keys.tobytes() + values.tobytes()
    times: dict[str, list[float]] = {"write": [], "commit": [], "plain": [], "append": []}
    grown = os.open(folder / "grown", os.O_WRONLY | os.O_CREAT)
    with perdure.open(folder / "store") as store:
        memory = store.memory("a", kind="knn", rows=1, heads=HEADS, dim=DIM, capacity=TOKENS * 2 * rounds)
        store.commit()
        for _ in range(rounds):
            times["write"].append(timed(lambda: memory.write(keys, values)))
            times["commit"].append(timed(store.commit))
            times["plain"].append(timed(lambda: flushed(folder / "plain", content)))
            times["append"].append(timed(lambda: (os.write(grown, content), os.fsync(grown))))
        rewritten = store.stats()["perdure_store_states_total"] - 1
    os.close(grown)
    half = {name: spent[rounds // 5 :] for name, spent in times.items()}  # the first open files and grow the store
    made = {f"{name} ms": statistics.median(spent) for name, spent in half.items()}
    made["commit / plain"] = made["commit ms"] / made["plain ms"]
    made["commit / append"] = made["commit ms"] / made["append ms"]
    for peer in ("plain", "append"):  # the mean has the commits that make the file longer; the plain one never grows
        made[f"mean commit / mean {peer}"] = statistics.fmean(half["commit"]) / statistics.fmean(half[peer])
    return made | {"states rewritten": rewritten}


def filled(mebibytes: int) -> perdure.KNNMemory:
    """A memory of that size, in 64 rows."""
    rows, tokens = 64, mebibytes * (1 << 20) // (64 * HEADS * DIM * 4 * 2)
    rng = np.random.default_rng(0)
    memory = perdure.KNNMemory(rows=rows, heads=HEADS, dim=DIM, capacity=tokens)
    for row in range(rows):
        keys = rng.standard_normal((1, HEADS, tokens, DIM)).astype(np.float32)
        memory.write(keys, keys, rows=[row])
    return memory


def files(folder: Path, mebibytes: int, rounds: int) -> dict[str, float]:
    """Saving and loading, beside the library that the format comes from, whose file is flushed as well."""
    memory = filled(mebibytes)
    state = memory.state_dict()
    ours, theirs = folder / "ours", folder / "theirs"

    def save_theirs() -> None:
        safetensors.numpy.save_file(state, theirs)
        with open(theirs, "r+b") as file:
            os.fsync(file.fileno())

    actions: dict[str, Callable[[], object]] = {
        "save": lambda: memory.save(ours),
        "save_file": save_theirs,
        "checksum": lambda: [hashlib.sha256(a.reshape(-1).view(np.uint8)).digest() for a in state.values()],
        "load": lambda: perdure.load(ours),
        "load_file": lambda: safetensors.numpy.load_file(theirs),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            times[name].append(timed(action))
        actions = dict(reversed(actions.items()))  # neither always after the other
    made = {f"{name} ms": statistics.median(spent[1:]) for name, spent in times.items()}
    for own, library in (("save", "save_file"), ("load", "load_file")):
        made[f"{own} / ({library} + checksum)"] = made[f"{own} ms"] / (made[f"{library} ms"] + made["checksum ms"])
    return made | {"MiB": float(mebibytes)}


def mapped(folder: Path, mebibytes: int, rounds: int) -> dict[str, float]:
    """Opening a file by mapping it, to the end of the first read, which is of one row."""
    memory = filled(mebibytes)
    memory.save(folder / "large")
    queries = np.random.default_rng(1).standard_normal((1, HEADS, 1, DIM)).astype(np.float32)
    memory.read(queries, k=32, rows=[0])  # compiles
    spent = [
        timed(lambda row=row: perdure.load(folder / "large", mmap=True).read(queries, k=32, rows=[row]))
        for row in range(rounds)
    ]
    return {"to the first read ms": statistics.median(spent), "MiB": float(mebibytes)}


def main() -> None:
    parser = argparse.ArgumentParser(description="What durability costs.")
    parser.add_argument("--rounds", type=int, default=40, help="commits measured (%(default)s)")
    parser.add_argument("--mebibytes", type=int, default=256, help="size of the saved memory (%(default)s)")
    parser.add_argument("--mapped", type=int, default=1024, help="size of the mapped memory (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of saving, loading and mapping (%(default)s)")
    parser.add_argument("--out", type=Path, help="a folder for durable.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        made = {"commit": commits(Path(name), options.rounds)}
        made["file"] = files(Path(name), options.mebibytes, options.repeats)
        made["mapped"] = mapped(Path(name), options.mapped, options.repeats)
    for part, numbers in made.items():
        print(part)
        for what, number in numbers.items():
            print(f"  {what:32}{number:10.2f}")
    if options.out:
        about = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        text = json.dumps({"about": about, **made}, indent=2, sort_keys=True)
        (options.out / "durable.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
