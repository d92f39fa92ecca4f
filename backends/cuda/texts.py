"""The CUDA C++ files: which there are, what they say, and one hash of all."""

from __future__ import annotations

import functools
import hashlib
import re
from importlib.resources import files

OPTIONS = ("--std=c++17",)  # NVRTC's; no fast math: results are compared with formulas


def sources() -> tuple[str, ...]:
    """Names of all files that hold kernels, sorted."""
    return tuple(sorted(file.name for file in files(__package__).iterdir() if file.name.endswith(".cu")))


@functools.cache
def source(name: str) -> str:
    """The text of the file `name`, with those that it includes in their places: compilers need look for no file."""
    text = files(__package__).joinpath(name).read_text("utf-8")
    return re.sub(r'^#include "(\w+\.cuh)"$', lambda match: source(match[1]), text, flags=re.M)


def fingerprint() -> str:
    """SHA-256 over the names, contents and options that GPUs are given: what evidence of a run on one is about."""
    digest = hashlib.sha256(" ".join(OPTIONS).encode())
    for name in sources():
        digest.update(f"\0{name}\0{source(name)}".encode())
    return digest.hexdigest()
