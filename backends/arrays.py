"""Whose array is this? Answered without importing any framework.

An array of a framework proves that the framework is imported already, so `sys.modules` is all there is to ask.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np

from .errors import BackendError, FrameworkError, MissingPackageError

_ARRAY_TYPES = {"torch": "Tensor", "cupy": "ndarray"}
STANDARD = "array-api"  # any other framework that speaks the array API standard: the formulas run on it as they stand


def framework(array: Any) -> str | None:
    """Name of the framework `array` belongs to ("numpy", "torch", "cupy", "array-api"), or None for no array."""
    if isinstance(array, np.ndarray):
        return "numpy"
    for name, array_type in _ARRAY_TYPES.items():
        module = sys.modules.get(name)
        if module is not None and isinstance(array, getattr(module, array_type, ())):
            return name
    return STANDARD if hasattr(array, "__array_namespace__") and not isinstance(array, np.generic) else None


def known_framework(argument: str, array: Any) -> str:
    """`framework(array)`, or FrameworkError where `array` is none."""
    name = framework(array)
    if name is None:
        raise FrameworkError(
            argument, "an array of NumPy, PyTorch or CuPy", type(array).__name__, f"Pass np.asarray({argument})."
        )
    if isinstance(array, np.matrix | np.ma.MaskedArray):  # they multiply otherwise, and a mask would be lost
        raise FrameworkError(argument, "a plain array", type(array).__name__, f"Pass np.asarray({argument}).")
    if name == "torch" and array.layout is not sys.modules["torch"].strided:
        raise FrameworkError(argument, "a dense tensor", str(array.layout), f"Pass {argument}.to_dense().")
    return name


def common_framework(**arrays: Any) -> str:
    """The one framework all of `arrays` (by argument name; None is skipped) belong to.

    Raises
    ------
    FrameworkError
        One is not an array, or two belong to different frameworks or devices.
    """
    seen: dict[str, tuple[str, Any]] = {}
    for argument, array in arrays.items():
        if array is None:
            continue
        seen[argument] = (known_framework(argument, array), getattr(array, "device", None))
    if not seen:
        known_framework(next(iter(arrays)), None)
    (first, (name, device)), *others = seen.items()
    for argument, (other, other_device) in others:
        if other != name:
            raise FrameworkError(
                argument, f"an array of {name}, as {first} is", f"one of {other}", _conversion(argument, name)
            )
        if other_device != device:
            raise FrameworkError(
                argument, f"an array on {device}, as {first} is", f"one on {other_device}", "Move both to one device."
            )
    return name


def _conversion(argument: str, to: str) -> str:
    line = {"numpy": f"np.asarray({argument}.cpu())", "torch": f"torch.as_tensor({argument})"}
    return f"Convert it first: {line.get(to, f'{to}.asarray({argument})')}."


def namespace(array: Any) -> ModuleType | Any:
    """The array-API namespace (2024.12) that computes on `array`.

    Raises
    ------
    MissingPackageError
        For torch and cupy, when `array-api-compat` is not installed.
    """
    name = framework(array)
    if name == "numpy":
        return np
    if name in _ARRAY_TYPES:
        module = f"array_api_compat.{name}"
        return sys.modules.get(module) or optional_import(module, extra=name)  # torch.compile traces no import
    return array.__array_namespace__()


def optional_import(module: str, extra: str) -> ModuleType:
    """Import a package that an extra brings.

    Raises
    ------
    MissingPackageError
        It is not installed; the remedy is the install line.
    BackendError
        It is installed and fails to import.
    """
    package = module.partition(".")[0].replace("_", "-")
    install = f'pip install "perdure[{extra}]"'
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(package, "an installed package", f"none ({error})", f"Run: {install}") from error
    except (ImportError, OSError) as error:  # OSError: a shared library of its own that does not load
        raise BackendError(
            package, "a package that can be imported", str(error), f"Reinstall it: {install} --force-reinstall"
        ) from error


def is_floating(array: Any) -> bool:
    """Whether `array` holds real floating-point numbers that backends compute with: bfloat16 yes, long double no."""
    name = framework(array)
    if name == "torch":
        return bool(array.is_floating_point()) and array.dtype.itemsize > 1  # PyTorch computes nothing in 8 bits
    if name == "numpy":
        return array.dtype.kind == "f" and array.dtype.itemsize <= 8
    return bool(namespace(array).isdtype(array.dtype, "real floating"))


def inspectable(array: Any) -> bool:
    """Whether the numbers of `array` can be looked at without waiting for a device, or breaking a compiled graph."""
    if framework(array) == "torch":
        return array.device.type == "cpu" and not sys.modules["torch"].compiler.is_compiling()
    return framework(array) != "cupy"


def cast(array: Any, dtype: Any) -> Any:
    """`array` in `dtype`; the same object where it is so already."""
    return array if array.dtype == dtype else namespace(array).astype(array, dtype)


def name_of(dtype: Any) -> str:
    """float32, int64, ...: what a dtype of any framework is called."""
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


def computing_dtype(*arrays: Any) -> Any:
    """The dtype floating `arrays` of one framework are computed in together: the widest of theirs, at least float32."""
    xp = namespace(arrays[0])
    promote = getattr(xp, "promote_types", xp.result_type)  # the one that torch.compile can trace, where there is one
    return functools.reduce(promote, (a.dtype for a in arrays), xp.float32)


def narrow(array: Any, dtype: Any) -> Any:
    """`array` in a floating `dtype`; what leaves its range becomes its largest number, not infinity."""
    if array.dtype == dtype:
        return array
    xp = namespace(array)
    largest = xp.finfo(dtype).max
    if largest < xp.finfo(array.dtype).max:
        if xp is np:  # most often nothing leaves it, which costs one look at the result
            with np.errstate(over="ignore"):
                made = array.astype(dtype)
            if np.isfinite(made).all():
                return made
        array = xp.where(xp.isinf(array), array, xp.clip(array, -largest, largest))
    return xp.astype(array, dtype)
