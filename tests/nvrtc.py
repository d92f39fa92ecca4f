"""NVRTC, NVIDIA's runtime compiler, by itself: it needs neither a GPU nor a driver."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


class CompileError(Exception):
    """What the compiler said."""


def library() -> ctypes.CDLL:
    """The library of the nvidia-cuda-nvrtc package."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = sorted(path for folder in folders for path in folder.rglob("libnvrtc.so.*") if "alt" not in path.name)
    if not found:
        raise CompileError("libnvrtc is missing: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(str(found[0]))


def compiled(text: str, architecture: str, *options: str) -> bytes:
    """Machine code (cubin) of CUDA C++ `text` for an architecture such as sm_90; every warning is an error."""
    nvrtc, program = library(), ctypes.c_void_p()
    names = [f"--gpu-architecture={architecture}", *options]
    given = (ctypes.c_char_p * len(names))(*(name.encode() for name in names))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"source.cu", 0, None, None)
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(names), given)
        said = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0\n")
        if status or said:
            raise CompileError(said.decode())
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size, get, program) -> bytes:
    length = ctypes.c_size_t()
    size(program, ctypes.byref(length))
    buffer = ctypes.create_string_buffer(length.value)
    get(program, buffer)
    return buffer.raw
