"""A device by its name or as its framework's own object, and arrays that travel to it and back."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from .arrays import cast, computing_dtype, framework, is_floating, namespace, narrow
from .errors import ArgumentError, BackendError, DeviceMemoryError
from .exchange import like, to_numpy
from .registry import load

ON_GPU = ("torch", "cupy")


class Host:
    """Main memory, where NumPy computes."""

    take = staticmethod(to_numpy)
    give = staticmethod(like)
    watched = staticmethod(nullcontext)

    def __reduce__(self) -> str:
        return "HOST"  # there is one


HOST = Host()


@dataclass(frozen=True)
class Place:
    """Where a memory's arrays live: a device, and the array-API namespace that computes on it."""

    xp: Any
    device: Any

    def take(self, array: Any) -> Any:
        """`array`, of any framework and device, here; floats as computed with. Itself where it is so already."""
        home = framework(array)
        if home not in (None, "numpy"):
            array = array.detach() if home == "torch" else array
            array = cast(array, computing_dtype(array)) if is_floating(array) else array
            if namespace(array) is self.xp and array.device == self.device:
                return array
            if on_same_gpu(array.device, self.device):
                return self.xp.from_dlpack(array)  # the same memory
        return self.xp.asarray(to_numpy(array), device=self.device)

    def give(self, array: Any, reference: Any, dtype: Any = None) -> Any:
        """`array`, from here, in the framework and on the device of `reference`, as `exchange.like` does."""
        xp = namespace(reference)
        if xp is not self.xp or reference.device != self.device:
            if not on_same_gpu(reference.device, self.device):
                return like(to_numpy(array), reference, dtype)
            array = xp.from_dlpack(array)
        return narrow(array, reference.dtype if dtype is None else dtype) if is_floating(array) else array

    def __reduce__(self) -> tuple[Any, ...]:
        return place_of, (self.device,)

    def watched(self) -> AbstractContextManager[None]:
        """Inside, a device that is full raises DeviceMemoryError."""
        return memory_of(self.device)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A new array here.

        Raises
        ------
        DeviceMemoryError
            The device has no room for it.
        """
        with memory_of(self.device):
            return self.xp.empty(shape, dtype=dtype, device=self.device)


@contextmanager
def memory_of(device: Any) -> Iterator[None]:
    """Inside, a device that is out of memory raises DeviceMemoryError, whatever its framework raises."""
    try:
        yield
    except DeviceMemoryError:
        raise
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        raise DeviceMemoryError(
            "device",
            f"free memory on {device}",
            str(error)[:200],
            "Nothing has changed. Lower the capacity, store as int8, or pass device_capacity to keep the older in "
            "main memory.",
        ) from error


def place_of(device: Any) -> Place | Host:
    """Where `device` is; None and "cpu" are main memory, and NumPy.

    Parameters
    ----------
    device : None, "cpu", "cuda", "cuda:N", or a framework's device object
        For "cuda" CuPy computes where it can, else PyTorch; a `torch.device` is PyTorch's, and so on.

    Raises
    ------
    ArgumentError
        No device.
    BackendError
        No driver, no such GPU, or no framework that computes on it.
    """
    if device is None or (isinstance(device, str) and device == "cpu"):
        return HOST
    if isinstance(device, str):
        match = re.fullmatch(r"cuda(?::(\d+))?", device)
        if match is None:
            raise ArgumentError("device", '"cpu", "cuda" or "cuda:N"', repr(device), 'Pass device="cuda".')
        return _gpu(int(match[1] or 0))
    package = type(device).__module__.partition(".")[0]
    module = sys.modules.get(f"array_api_compat.{package}") if package in ON_GPU else sys.modules.get(package)
    if package in ON_GPU and module is None:
        load(package)
        module = sys.modules[f"array_api_compat.{package}"]
    if module is None or not hasattr(module, "asarray"):
        raise ArgumentError("device", '"cpu", "cuda", "cuda:N" or a device', repr(device), 'Pass device="cuda".')
    _check(package, device)
    return Place(module, device)


def _gpu(number: int) -> Place:
    """GPU `number`, with CuPy, else with PyTorch."""
    reasons = []
    try:
        load("cupy")
        import cupy

        return Place(namespace(cupy.empty(0)), _check("cupy", cupy.cuda.Device(number)))
    except BackendError as error:
        reasons.append(str(error))
    try:
        load("torch")
        import torch

        return Place(namespace(torch.empty(0)), _check("torch", torch.device("cuda", number)))
    except BackendError as error:
        reasons.append(str(error))
    raise BackendError(
        "device",
        f"GPU {number}, and CuPy or PyTorch to compute on it",
        " ".join(reasons),
        'Check the driver with nvidia-smi, or keep the memory in main memory with device="cpu".',
    )


def _check(package: str, device: Any) -> Any:
    """`device`, tried for real where it is a GPU: frameworks make objects for devices that are not there."""
    if package not in ON_GPU or getattr(device, "type", "cuda") != "cuda":
        return device
    try:
        if package == "torch":
            import torch

            torch.zeros(1, device=device)
        else:
            with device:
                sys.modules["cupy"].zeros(1)
    except Exception as error:  # of any of a dozen classes
        raise BackendError(
            f"device of {package}",
            f"{device} to compute",
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            "Check with nvidia-smi which GPUs there are.",
        ) from error
    return device


def on_same_gpu(a: Any, b: Any) -> bool:
    """Whether two devices, of CuPy or PyTorch, are the same GPU."""
    return None not in (number := (_gpu_of(a), _gpu_of(b))) and number[0] == number[1]


def _gpu_of(device: Any) -> int | None:
    """The number of the GPU that a device of CuPy or PyTorch is."""
    package = type(device).__module__.partition(".")[0]
    if package == "cupy":
        return int(device.id)
    if package != "torch" or device.type != "cuda":
        return None
    return sys.modules["torch"].cuda.current_device() if device.index is None else device.index
