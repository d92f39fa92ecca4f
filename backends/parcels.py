"""Arrays on their way from a device to main memory, while the device and the caller go on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import framework, name_of, namespace
from .exchange import to_numpy


@dataclass(frozen=True)
class Parcel:
    """What `send` returns; keeps all that the copy reads and writes until it is taken."""

    staged: Any  # a copy of what was sent, on the device: the original may change from here on
    host: Any = None  # page-locked main memory that it is copied to, where the framework can
    done: Any = None  # the event after that copy

    def take(self) -> np.ndarray:
        """The array in main memory, in its own dtype; waits for its copy, and for nothing else."""
        if self.done is None:
            return as_is(self.staged)
        self.done.synchronize()
        return self.host if isinstance(self.host, np.ndarray) else self.host.numpy()


def send(array: Any) -> Parcel:
    """Begin to copy `array` to main memory: on a GPU in a stream of its own, elsewhere when it is taken."""
    staged = namespace(array).asarray(array, copy=True)
    match framework(array):
        case "torch" if array.device.type == "cuda":
            return _with_torch(staged)
        case "cupy":
            return _with_cupy(staged)
    return Parcel(staged)


def _with_torch(staged: Any) -> Parcel:
    import torch

    with torch.cuda.device(staged.device):
        stream = _torch_stream(staged.device)
        stream.wait_stream(torch.cuda.current_stream(staged.device))
        host = torch.empty(staged.shape, dtype=staged.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(staged, non_blocking=True)
            staged.record_stream(stream)
            return Parcel(staged, host, stream.record_event())


@functools.cache
def _torch_stream(device: Any) -> Any:
    import torch

    return torch.cuda.Stream(device)


def _with_cupy(staged: Any) -> Parcel:
    import cupy
    import cupyx

    with staged.device:
        stream = _cupy_stream(int(staged.device.id))
        stream.wait_event(cupy.cuda.get_current_stream().record())
        host = cupyx.empty_pinned(staged.shape, staged.dtype)
        staged.get(stream=stream, out=host, blocking=False)
        return Parcel(staged, host, stream.record())


@functools.cache
def _cupy_stream(device: int) -> Any:
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def as_is(array: Any) -> np.ndarray:
    """`array` as NumPy; half precision, which `to_numpy` widens, in its own dtype."""
    return to_numpy(array).astype(name_of(array.dtype), copy=False)
