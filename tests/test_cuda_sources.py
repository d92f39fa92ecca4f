"""Every CUDA source compiles to machine code for the GPUs that perdure names. Compiled is not run: see docs/gpu.rst."""

from __future__ import annotations

import nvrtc
import pytest
from cuda_host import kernels_of
from perdure.backends.cuda import source, sources
from perdure.backends.cuda.texts import OPTIONS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", sources())
def test_a_source_compiles_without_a_warning(name, architecture):
    code = nvrtc.compiled(source(name), architecture, *OPTIONS)
    assert code.startswith(b"\x7fELF")
    kernels = kernels_of(source(name))
    assert kernels
    assert [kernel for kernel in kernels if kernel.encode() not in code] == []


def test_the_compiler_check_can_fail():
    with pytest.raises(nvrtc.CompileError, match="undefined"):
        nvrtc.compiled('extern "C" __global__ void broken(float* x) { *x = missing; }', "sm_90")
