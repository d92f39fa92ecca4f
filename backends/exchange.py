"""Arrays of any framework in, NumPy inside, the caller's framework, device and dtype out."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import STANDARD, cast, computing_dtype, is_floating, known_framework, namespace, narrow
from .registry import load


def to_numpy(array: Any) -> np.ndarray:
    """`array` as NumPy, on its own memory where it is in main memory; half precision becomes float32."""
    home = known_framework("array", array)
    if is_floating(array):
        array = cast(array, computing_dtype(array))
    if home == "numpy":
        return array
    return _standard_to_numpy(array) if home == STANDARD else load(home).to_numpy(array)


def _standard_to_numpy(array: Any) -> np.ndarray:
    """By way of its framework's default device, which shares main memory."""
    home = namespace(array).__array_namespace_info__().default_device()
    return np.asarray(array if array.device == home else array.to_device(home))


def like(array: np.ndarray, reference: Any, dtype: Any = None) -> Any:
    """`array` in the framework and on the device of `reference`; floats in `dtype`, or else in its dtype."""
    home = known_framework("reference", reference)
    if home == "numpy":
        given = array
    elif home == STANDARD:
        given = namespace(reference).asarray(array, device=reference.device)
    else:
        given = load(home).from_numpy(array, reference.device)
    return narrow(given, reference.dtype if dtype is None else dtype) if is_floating(given) else given
