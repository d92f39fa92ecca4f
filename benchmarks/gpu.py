"""The CUDA kernels on a GPU: first whether they are right, then how fast, each beside what the hardware allows.

    nox -s gpu                                both parts below; writes results/gpu-evidence.json
    python benchmarks/gpu.py --part check     the tests marked `gpu`, memory and race checks: under 10 minutes
    python benchmarks/gpu.py --part time      times and errors: under 10 minutes; added to what the other part wrote
    python benchmarks/gpu.py --dry-run        the program itself, small and on the CPU: no result of it means anything

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

import numpy as np
import torch
from perdure.backends.cuda import fingerprint

import perdure

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "benchmarks" / "results" / "gpu-evidence.json"
HEADS, DIM, K, N_BASIS = 8, 64, 32, 512
MOST_SECONDS = {"tests": 400, "memcheck": 90, "racecheck": 90}  # 10 minutes in all
LLAMA = {  # the sizes of SmolLM2-135M; weights do not change the time
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "vocab_size": 49_152, "max_position_embeddings": 8192, "rope_theta": 100_000.0},
}
WINDOW = 512
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


def full_memory(capacity: int, **settings: Any) -> Any:
    """A memory on the device, of random tokens, full."""
    memory = perdure.KNNMemory(1, HEADS, DIM, capacity, device=torch.device(device), **settings)
    while memory.tokens[0] < capacity:
        memory.write(*(torch.randn(1, HEADS, min(capacity, 65_536), DIM, device=device) for _ in "kv"))
    return memory


def writes(n: int, capacity: int, rounds: int, copies: float) -> dict[str, Any]:
    """A segment into a memory that is full; and what starting any kernel takes."""
    memory = full_memory(capacity)
    draws = [tuple(torch.randn(1, HEADS, n, DIM, device=device) for _ in "kv") for _ in range(3)]
    moved = 2 * 2 * 4 * HEADS * n * DIM
    took, one = times(memory.write, draws, rounds), torch.zeros(1, device=device)
    return {
        "what": f"write of {n} tokens",
        **{"ms": took, "launch ms": times(lambda: one.add_(1), [()], rounds), "operations": 0, "bytes": moved},
        "limit ms": moved / copies,
    }


def searches(dtype: str, capacity: int, q: int, rounds: int, copies: float) -> dict[str, Any]:
    """A search of a memory whose keys are stored as `dtype`, neighbours brought along."""
    memory = full_memory(capacity, dtype=dtype)
    draws = [(torch.randn(1, HEADS, q, DIM, device=device), K) for _ in range(3)]
    operations = 2 * HEADS * q * capacity * DIM
    moved = HEADS * capacity * (DIM * {"float32": 4, "int8": 1}.get(dtype, 2) + 4 * (dtype == "int8"))
    return {
        "what": f"search of a {dtype} memory, {HEADS} heads x {DIM}, N {capacity}, {q} queries",
        **{"ms": times(memory.search, draws, rounds), "operations": operations, "bytes": moved},
        "limit ms": max(operations / product_rate(q, capacity), moved / copies),
    }


def model_step(capacity: int, rounds: int, small: bool) -> dict[str, Any]:
    """A window through a Llama of SmolLM2's sizes with a full memory in every layer; and with naive torch for one."""
    import transformers
    from perdure.bindings.transformers import attach, layer

    torch.manual_seed(0)
    sizes = {**LLAMA, "num_hidden_layers": 2, "vocab_size": 99} if small else LLAMA
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(device).eval()
    memory = attach(model, k=K, capacity=capacity, positions="true", window=WINDOW, device=device)
    windows = [torch.randint(sizes["vocab_size"], (1, WINDOW), device=device) for _ in range(3)]
    with torch.no_grad():
        for window in windows:  # makes the stores
            model(input_ids=window, use_cache=False)
        for one in memory.layers.values():
            near, heads = one.stores["near"], sizes["num_key_value_heads"]
            while near.tokens[0] < near.capacity:
                some = min(near.capacity, 65_536)
                keys, values = (torch.randn(1, heads, some, DIM, device=device) for _ in "kv")
                near.write(keys, values, tags=np.arange(some)[None] % 4096)

        def step(window: torch.Tensor) -> Any:
            return model(input_ids=window, use_cache=False).logits

        ours, kept = times(step, [(w,) for w in windows], rounds), layer.read_memory
        layer.read_memory = naive_read
        try:
            other = times(step, [(w,) for w in windows], max(rounds // 5, 2))
        finally:
            layer.read_memory = kept
    queries = WINDOW * sizes["num_attention_heads"] * sizes["num_hidden_layers"]
    return {
        "what": f"a step of {WINDOW} tokens, SmolLM2-135M's sizes, memory of {capacity} in all layers",
        **{"ms": ours, "naive ms": other, "operations": 2 * queries * capacity * DIM},
        "bytes": 4 * DIM * capacity * sizes["num_key_value_heads"] * sizes["num_hidden_layers"],
    }


def naive_read(memory: Any, query: torch.Tensor, k: int, scale: float) -> perdure.Reading:
    """In place of `read_memory`: matmul, topk and gather over the memory's own arrays, of one row."""
    row = memory._rows[0]
    keys, values = (row.arrays[name][:, : row.here] for name in ("keys", "values"))
    asked = query.reshape(keys.shape[0], -1, query.shape[-1])  # (heads, group x q, dim)
    scores, slots = (scale * (asked @ keys.mT)).topk(min(k, keys.shape[1]))
    heads = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
    output = (torch.softmax(scores, dim=-1)[..., None] * values[heads, slots]).sum(-2)
    return perdure.Reading(output.reshape(*query.shape[:3], -1), scores.logsumexp(-1).reshape(query.shape[:3]))


def tested() -> dict[str, int]:
    """Counts of the tests marked `gpu`, run now."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", str(ROOT / "tests")]
        done(command, "tests")
        if not report.exists():
            return {"tests": 0, "failures": 0, "errors": 1, "skipped": 0, "passed": 0}
        suite = next(ET.parse(report).iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}


def sanitized() -> dict[str, str]:
    """What compute-sanitizer, of the CUDA toolkit, says of the kernels on small cases."""
    said, sanitizer = {}, shutil.which("compute-sanitizer")
    small = ("-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "test_cuda_kernels.py"))
    for tool in ("memcheck", "racecheck"):
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", sys.executable, *small]
        chosen = "masks or seen or several or stored or empty"
        code = None if sanitizer is None else done([*command, "-k", chosen], tool)
        said[tool] = "not on this machine" if sanitizer is None else {0: "passed", None: "no time"}.get(code, "failed")
    return said


def done(command: list[str], what: str) -> int | None:
    """The exit code of a command, None where it took too long."""
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=MOST_SECONDS[what]).returncode
    except subprocess.TimeoutExpired:
        return None


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


def timed(rounds: int, small: bool) -> dict[str, Any]:
    """Bandwidth, and every result."""
    copies = copy_rate(1 << (20 if small else 32))
    work: list[Callable[[], dict[str, Any]]] = [
        *(lambda n=n, q=q: retrieval(n, q, rounds, copies) for n, q in ([(2048, 8)] if small else SHAPES)),
        lambda: continuous(64 if small else 4096, rounds, copies),
        lambda: writes(512, 1024 if small else 65_536, rounds, copies),
        *(
            lambda dtype=dtype: searches(dtype, 1024 if small else 262_144, 8 if small else 512, rounds, copies)
            for dtype in ("float32", "bfloat16", "float16", "int8")
        ),
        lambda: model_step(1024 if small else 262_144, rounds, small),
    ]
    results = []
    for one in work:  # one that fails costs its own result only
        try:
            result = one()
        except Exception as error:
            result = {"what": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        print({name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in result.items()}, flush=True)
        results.append(result)
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"copy GB/s": copies / 1e6, "results": results}


def before(whole: dict[str, Any]) -> dict[str, Any]:
    """What the other part wrote, if it was about this very machine and these very sources."""
    try:
        found = json.loads(EVIDENCE.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if all(found.get(name) == value for name, value in whole.items()) else {}


def main() -> int:
    """Run what was asked for; write the evidence unless this is a dry run. The number of what failed."""
    global device
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("check", "time", "all"), default="all")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if options.dry_run:
        device, options.rounds = "cpu", 2
    elif not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can compute on: check with nvidia-smi, or pass --dry-run")
    whole = about()
    nothing = {"tests": {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "passed": 0}}
    found = {**nothing, **before(whole), **whole}
    if options.part != "time" and not options.dry_run:
        found |= {"tests": tested(), "sanitizers": sanitized()}
    if options.part != "check":
        found |= timed(options.rounds, options.dry_run)
    if not options.dry_run:
        EVIDENCE.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(f"wrote {EVIDENCE}")
    failed = sum("error" in result for result in found.get("results", ()))
    bad = sum(said == "failed" for said in found.get("sanitizers", {}).values())
    return failed + bad + found["tests"]["failures"] + found["tests"]["errors"]


if __name__ == "__main__":
    sys.exit(min(main(), 1))
