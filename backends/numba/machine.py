"""What the CPU offers to vector code: width and number of its registers, and a fused multiply-add."""

from __future__ import annotations

import functools
import platform

import llvmlite.binding as llvm
from numba import config


@functools.cache
def features() -> frozenset[str]:
    """Names, as LLVM knows them, of the CPU features that Numba compiles for."""
    if config.CPU_FEATURES is not None:
        return frozenset(f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+"))
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def register_bytes() -> int:
    """Bytes of a vector register."""
    if "avx512f" in features():
        return 64
    return 32 if "avx2" in features() else 16


def registers() -> int:
    """How many vector registers there are."""
    return 16 if is_x86() and "avx512f" not in features() else 32


def fuses() -> bool:
    """Whether the CPU computes a·b + c with one rounding."""
    return not is_x86() or "fma" in features()


def converts_half() -> bool:
    """Whether the CPU turns float16 into float32."""
    return not is_x86() or "f16c" in features()


def dots() -> bool:
    """Whether the CPU adds the products of four unsigned and four signed bytes to 32 bits (AVX-512 VNNI)."""
    return is_x86() and {"avx512f", "avx512bw", "avx512vnni"} <= features()


def multiplies_bytes() -> bool:
    """Whether the CPU multiplies vectors of unsigned and signed bytes at all (AVX2, or VNNI)."""
    return dots() or (is_x86() and register_bytes() == 32)
