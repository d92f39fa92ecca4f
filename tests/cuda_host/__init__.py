"""CUDA kernels run on the CPU: their sources as they stand, compiled by a C++ compiler behind `shim.h`.

The launchers in perdure.backends.cuda start them as they would on a GPU, with NumPy arrays in place of a GPU's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import perdure.backends.cuda.launch as cuda_launch
from perdure.backends import registry
from perdure.backends.cuda import attention, expected, histogram, retrieve, retrieve_stored, source, systematic, unit
from perdure.backends.errors import BackendError

# as a backend: the twins, over `start` below
__all__ = ["attention", "expected", "histogram", "retrieve", "retrieve_stored", "systematic", "unit"]
HERE = Path(__file__).parent
OPTIONS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-shared",
    "-w",
    "-U_FORTIFY_SOURCE",
    *os.environ.get("CUDA_HOST_FLAGS", "").split(),
)
ENTRY = """
extern "C" int launch_{0}(const unsigned* blocks, unsigned threads, unsigned seed, void** given)
{{ return host::launch({0}, blocks, threads, seed, given); }}
extern "C" void signature_{0}(char* out) {{ host::signature({0}, out); }}
"""

seeds = np.random.default_rng(0)
launched: list[str] = []  # names of the kernels that ran, so that a test can tell that they did


def probe() -> None:
    """Raise where there is no C++ compiler."""
    if compiler() is None:
        raise BackendError("cuda-host", "a C++ compiler", "none", "Install g++ or clang++.")


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def kernels_of(text: str) -> list[str]:
    """Names of the kernels a file defines, by itself or through its macros for several types."""
    names = re.findall(r'extern "C" __global__ void __launch_bounds__\(.*\)[\s\\]*([\w#]+?)\(', text)
    depths = re.findall(r"^ *[A-Z_]+\((\d+), Stored, suffix\)", text, re.M)
    names = [n.replace("##DEPTH##", depth) for n in names for depth in (depths if "##DEPTH##" in n else [""])]
    suffixes = re.findall(r"^[A-Z]+\(\w+, (\w+)\)$", text, re.M) or [""]
    return [name.replace("##suffix", suffix) for name in names for suffix in suffixes]


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="perdure-cuda-host-")


def compile_text(name: str, text: str) -> ctypes.CDLL:
    """The library of a source's text."""
    probe()
    place = Path(tempfile.mkdtemp(dir=folder().name))  # a library of its own: one path is loaded once
    entries = "".join(ENTRY.format(kernel) for kernel in kernels_of(text))
    (place / f"{name}.cpp").write_text(f'#include "{HERE / "shim.h"}"\n{text}\n{entries}', "utf-8")
    command = [str(compiler()), *OPTIONS, f"{place / name}.cpp", "-o", f"{place / name}.so"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(f"{place / name}.so")


@functools.cache
def library(file: str) -> ctypes.CDLL:
    return compile_text(file.removesuffix(".cu"), source(file))


def run(built: ctypes.CDLL, kernel: str, grid: tuple[int, int, int], threads: int, words: list[np.generic]) -> None:
    """Run a grid; the words must be of the C types that the kernel declares."""
    expected = ctypes.create_string_buffer(256)
    built[f"signature_{kernel}"](expected)
    kinds = {"u": "p", "i": "i", "f": "f"}
    came = "".join(kinds[word.dtype.kind] + str(word.dtype.itemsize) for word in words)
    if came != expected.value.decode():
        raise TypeError(f"{kernel} takes {expected.value.decode()}, but was given {came}")
    holders = [np.array([word]) for word in words]
    given = (ctypes.c_void_p * len(words))(*(holder.ctypes.data for holder in holders))
    seed = ctypes.c_uint(int(seeds.integers(2**32)))
    if built[f"launch_{kernel}"]((ctypes.c_uint * 3)(*grid), ctypes.c_uint(threads), seed, given):
        raise RuntimeError(f"{kernel}: threads wait for one another forever")
    launched.append(kernel)


def start(file: str, kernel: str, grid: tuple[int, ...], threads: int, words: list[np.generic], first: object) -> None:
    """The launcher of arrays in main memory."""
    run(library(file), kernel, (*grid, 1, 1)[:3], threads, words)


@contextmanager
def registered() -> Iterator[None]:
    """Inside, this module is the backend `cuda-on-host`."""
    registry.register("cuda-on-host", sys.modules[__name__])
    before = dict(cuda_launch.LAUNCHERS)
    cuda_launch.LAUNCHERS.update(numpy=start, torch=start)
    try:
        yield
    finally:
        del registry._modules["cuda-on-host"]
        cuda_launch.LAUNCHERS.clear()
        cuda_launch.LAUNCHERS.update(before)
