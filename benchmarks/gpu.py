"""The CUDA kernels on a GPU: first whether they are right, then how fast, each beside what the hardware allows.

    nox -s gpu                            the tests marked `gpu`, then all of this; writes results/gpu-evidence.json
    python benchmarks/gpu.py --dry-run    the program itself, small and on the CPU: no result of it means anything

Times are medians of CUDA events over rounds that rotate through several inputs. The limit of a call is the larger of
its operations over the rate of PyTorch's bf16 matrix product of the same shape, measured in the same run, and its
bytes over the measured bandwidth of a copy. `naive` is torch: matmul, topk, gather, softmax.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from perdure.backends.cuda import fingerprint

import perdure

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "benchmarks" / "results" / "gpu-evidence.json"
HEADS, DIM, K, N_BASIS = 8, 64, 32, 512
SHAPES = [(n, q) for n in (65_536, 262_144, 1_048_576) for q in (512, 1)]
PACKAGES = ("torch", "cupy-cuda12x", "cupy-cuda13x", "numpy", "nvidia-cuda-nvrtc")
device = "cuda"


def times(work: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], rounds: int) -> float:
    """Median milliseconds of `work` on inputs that take turns."""
    for given in inputs:
        work(*given)  # compiles
    spent = []
    for i in range(rounds):
        given = inputs[i % len(inputs)]
        if device == "cpu":
            begin = time.perf_counter()
            work(*given)
            spent.append(1e3 * (time.perf_counter() - begin))
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work(*given)
        last.record()
        last.synchronize()
        spent.append(first.elapsed_time(last))
    return statistics.median(spent)


def copy_rate(size: int) -> float:
    """Bytes a millisecond, read and written, of a copy on the device."""
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / times(lambda: b.copy_(a), [()], 20)


def product_rate(q: int, n: int) -> float:
    """Operations a millisecond of the bf16 matrix product queries x keys."""
    a, b = (torch.randn(HEADS, rows, DIM, device=device, dtype=torch.bfloat16) for rows in (q, n))
    return 2 * HEADS * q * n * DIM / times(lambda: a @ b.mT, [()], 10)


def naive(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What one writes without a library."""
    scores, positions = (queries @ keys.mT).topk(K)
    heads = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
    weights = torch.softmax(scores / math.sqrt(DIM), dim=-1)
    return (weights[..., None] * values[heads, positions]).sum(-2)


def fused(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The same with perdure."""
    near = perdure.top_k(queries, keys, K)
    return perdure.attend(queries, keys, values, near.positions).output


def retrieval(n: int, q: int, rounds: int, copies: float) -> dict[str, Any]:
    """Top-k and attention over n keys a head."""
    draws = [[torch.randn(HEADS, rows, DIM, device=device) for rows in (q, n, n)] for _ in range(3)]
    ours, other = (times(work, draws, rounds) for work in (fused, naive))
    exact = naive(*(a.double() for a in draws[0]))
    operations = 2 * HEADS * q * n * DIM + 4 * HEADS * q * K * DIM
    moved = 4 * HEADS * DIM * (n + q * (2 * K + 2))  # the keys once, each query's neighbours, queries and output
    return {
        "what": f"top-{K} and attention, {HEADS} heads x {DIM}, N {n}, {q} queries",
        **{"ms": ours, "naive ms": other, "operations": operations, "bytes": moved},
        "limit ms": max(operations / product_rate(q, n), moved / copies),
        "largest error": float((fused(*draws[0]) - exact).abs().max()),
    }


def continuous(q: int, rounds: int, copies: float) -> dict[str, Any]:
    """What q queries a head see of a signal of N functions."""
    signal = perdure.fit(torch.randn(HEADS, 2 * N_BASIS, DIM, device=device), perdure.gaussian_basis(N_BASIS))
    draws = [(signal, torch.rand(HEADS, q, device=device), torch.full((HEADS, q), 1e-3, device=device)) for _ in "123"]
    operations = 2 * HEADS * q * N_BASIS * DIM  # and q N expectations a head: some forty more each
    moved = 4 * HEADS * (N_BASIS * DIM + q * (DIM + 2))
    return {
        "what": f"continuous attention, {HEADS} heads x {DIM}, N {N_BASIS}, {q} queries",
        **{"ms": times(perdure.expected_value, draws, rounds), "operations": operations, "bytes": moved},
        "limit ms": max(operations / product_rate(q, N_BASIS), moved / copies),
    }


def writes(n: int, capacity: int, rounds: int, copies: float) -> dict[str, Any]:
    """A segment into a memory that is full."""
    where = torch.device(device)
    memory = perdure.KNNMemory(1, HEADS, DIM, capacity, device=where)
    draws = [tuple(torch.randn(1, HEADS, n, DIM, device=device) for _ in "kv") for _ in range(3)]
    while memory.tokens[0] < capacity:
        memory.write(*draws[0])
    moved = 2 * 2 * 4 * HEADS * n * DIM
    took = times(memory.write, draws, rounds)
    return {"what": f"write of {n} tokens", "ms": took, "operations": 0, "bytes": moved, "limit ms": moved / copies}


def tested() -> dict[str, int]:
    """Counts of the tests marked `gpu`, run now."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", str(ROOT / "tests")]
        subprocess.run(command, cwd=ROOT, check=False)
        suite = next(ET.parse(report).iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}


def about() -> dict[str, Any]:
    """The machine, its versions, and what of this repository ran."""

    def said(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return "unknown"
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "none: a dry run",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {**versions, "cuda": torch.version.cuda},
        "sources": fingerprint(),
        "commit": said("git", "describe", "--always", "--dirty", "--abbrev=12"),
    }


def main() -> None:
    """Run all; write the evidence unless this is a dry run."""
    global device
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if options.dry_run:
        device, options.rounds = "cpu", 2
    elif not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can compute on: check with nvidia-smi, or pass --dry-run")
    small = options.dry_run
    whole = {**about(), "tests": None if small else tested(), "copy GB/s": None, "results": []}
    copies = copy_rate(1 << (20 if small else 32))
    whole["copy GB/s"] = copies / 1e6
    for n, q in [(2048, 8)] if small else SHAPES:
        whole["results"].append(retrieval(n, q, options.rounds, copies))
    whole["results"].append(continuous(64 if small else 4096, options.rounds, copies))
    whole["results"].append(writes(512, 1024 if small else 65_536, options.rounds, copies))
    for result in whole["results"]:
        print({name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in result.items()})
    if not small:
        EVIDENCE.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
        print(f"wrote {EVIDENCE}")


if __name__ == "__main__":
    main()
