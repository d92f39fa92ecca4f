"""How a kernel is started on arrays where they lie: on the current stream of the framework that they belong to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

from ..arrays import framework, namespace
from .texts import OPTIONS, source

Launcher = Callable[[str, str, tuple[int, ...], int, list[Any], Any], None]
MOST_BLOCKS = 65_535  # along the second and third axis of a grid


def launch(file: str, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
    """Start `kernel` of `file` on `grid` blocks of `threads`; it has the kernel's argument list.

    Arguments are arrays, None for a null pointer, or NumPy scalars of the very C type: nothing converts them.
    """
    first = next(a for a in arguments if framework(a) is not None)
    words = [a if isinstance(a, np.generic) else np.uint64(0 if a is None else address(a)) for a in arguments]
    LAUNCHERS[str(framework(first))](file, kernel, grid, threads, words, first)


def address(array: Any) -> int:
    """Where the first element of a contiguous array lies."""
    match framework(array):
        case "torch":
            return array.data_ptr()
        case "cupy":
            return array.data.ptr
    return array.ctypes.data


def _with_cupy(file: str, kernel: str, grid: tuple[int, ...], threads: int, words: list[Any], first: Any) -> None:
    with _place(first):
        import cupy

        _compiled(file, kernel, cupy.cuda.runtime.getDevice())(grid, (threads,), tuple(words))


@functools.cache
def _compiled(file: str, kernel: str, device: int) -> Any:
    """A function of the current device; kept by CuPy on disk too."""
    import cupy

    return cupy.RawModule(code=source(file), options=OPTIONS).get_function(kernel)


def _place(array: Any) -> AbstractContextManager[Any]:
    """The array's device, and its framework's current stream, made CuPy's own."""
    import cupy

    if framework(array) == "cupy":
        return array.device
    import torch

    stack = ExitStack()
    stack.enter_context(cupy.cuda.Device(array.device.index))
    stack.enter_context(cupy.cuda.ExternalStream(torch.cuda.current_stream(array.device).cuda_stream))
    return stack


LAUNCHERS: dict[str, Launcher] = {
    "cupy": _with_cupy,
    "torch": _with_cupy,
}  # tests add one that runs kernels on the host


def contiguous(array: Any) -> Any:
    """`array` row by row in memory; itself where it is so already."""
    return array.contiguous() if framework(array) == "torch" else namespace(array).ascontiguousarray(array)


def leading(*arrays: Any, own: int = 2) -> tuple[int, ...]:
    """The common leading shape of arrays that have `own` axes of their own."""
    return np.broadcast_shapes(*(tuple(a.shape[:-own]) for a in arrays))


def flat(array: Any, lead: Sequence[int]) -> Any:
    """`array` (..., a, b), broadcast to `lead`, as contiguous (batch, a, b)."""
    own = tuple(array.shape[-2:])
    if tuple(array.shape[:-2]) != tuple(lead):
        array = namespace(array).broadcast_to(array, (*lead, *own))
    return contiguous(array).reshape((math.prod(lead), *own))


def shared_or_flat(array: Any, lead: Sequence[int]) -> tuple[Any, np.int64]:
    """The same, but one copy where all of `lead` share it, and as it lies where whole batches are contiguous.

    The second is the number of elements from one batch to the next.
    """
    own = tuple(array.shape[-2:])
    if math.prod(array.shape[:-2]) == 1:
        return contiguous(array).reshape((1, *own)), np.int64(0)
    between, *inner = strides(array)[-3:]
    if (
        array.ndim == 3
        and tuple(array.shape[:-2]) == tuple(lead)
        and inner == [own[1], 1]
        and between >= own[0] * own[1]
    ):
        return array, np.int64(between)  # part of a ring that is not full yet, as a rule
    return flat(array, lead), np.int64(own[0] * own[1])


def strides(array: Any) -> list[int]:
    """Elements from one to the next along each axis."""
    if framework(array) == "torch":
        return list(array.stride())
    return [stride // array.itemsize for stride in array.strides]


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """A new array beside `like`; nothing is written to it."""
    return namespace(like).empty(shape, dtype=dtype, device=like.device)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """A new array of zeros beside `like`."""
    return namespace(like).zeros(shape, dtype=dtype, device=like.device)


def mask_bytes(mask: Any, lead: Sequence[int]) -> tuple[Any, np.ndarray]:
    """A mask, one byte a pair, with the bytes from one batch, query and key to the next; axes of 1 stay so."""
    if mask is None:
        return None, np.zeros(3, np.int64)
    mask = mask if mask.ndim >= 2 else mask[None, :]
    rows, columns = mask.shape[-2:]
    mask, batch = shared_or_flat(mask, lead)
    return mask, np.array([batch, 0 if rows == 1 else columns, 0 if columns == 1 else 1], np.int64)
