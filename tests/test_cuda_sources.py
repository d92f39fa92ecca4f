"""Every CUDA source compiles to machine code for the GPUs that perdure names. Compiled is not run: see docs/gpu.rst."""

from __future__ import annotations

import re

import nvrtc
import pytest
from perdure.backends.cuda import launch, source, sources
from perdure.backends.cuda.sources import OPTIONS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", sources())
def test_a_source_compiles_without_a_warning(name, architecture):
    code = nvrtc.compiled(source(name), architecture, *OPTIONS)
    assert code.startswith(b"\x7fELF")
    kernels = kernels_of(source(name))
    assert kernels
    assert [kernel for kernel in kernels if kernel.encode() not in code] == []


def kernels_of(text):
    """Names of the kernels a file defines, by itself or through one of its macros."""
    names = re.findall(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\)?[\s\\]*(\w+)\(', text)
    suffixes = re.findall(r"^[A-Z]+\(\w+, (\w+)\)$", text, re.M)
    return [n.removesuffix("##suffix") + s for n in names for s in suffixes] if suffixes else names


def test_the_compiler_check_can_fail():
    with pytest.raises(nvrtc.CompileError, match="undefined"):
        nvrtc.compiled('extern "C" __global__ void broken(float* x) { *x = missing; }', "sm_90")
