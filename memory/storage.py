"""What keys and values are stored as, and how they become numbers again."""

from __future__ import annotations

from typing import Any

import numpy as np

RAW = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8, "float64": np.float64}
DTYPES = tuple(RAW)
LEVELS = 127
COARSEST = np.nextafter(np.finfo(np.float32).max / np.float32(LEVELS), np.float32(0))  # LEVELS times that is finite


def computing(dtype: str) -> np.dtype:
    """What numbers stored as `dtype` are computed with."""
    return np.dtype(np.float64 if dtype == "float64" else np.float32)


def empty(name: str, shape: tuple[int, int, int], dtype: str) -> dict[str, np.ndarray]:
    """The arrays that hold vectors (heads, slots, d): `name`, and with int8 the scale of each, `name`_scales."""
    arrays = {name: np.empty(shape, RAW[dtype])}
    return arrays if dtype != "int8" else {**arrays, f"{name}_scales": np.empty(shape[:2], np.float32)}


def encode(name: str, numbers: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Vectors (..., d) as these arrays; what does not fit becomes infinite, silently, for the finite check to find.

    bfloat16 is the upper half of float32, rounded to nearest, ties to even. int8 is a whole number from -127 to 127
    times a scale a vector, the largest magnitude over 127.
    """
    if numbers.dtype == RAW[dtype]:
        return {name: numbers}
    with np.errstate(over="ignore"):
        numbers = numbers.astype(computing(dtype), copy=False)
        if dtype == "bfloat16":
            bits = (
                numbers.view(np.uint32) if numbers.flags.c_contiguous else np.ascontiguousarray(numbers).view(np.uint32)
            )
            return {name: ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)}
        if dtype == "int8":
            largest = np.max(np.abs(numbers), axis=-1, initial=0)
            scales = np.minimum(largest / np.float32(LEVELS), COARSEST)
            steps = np.where(scales > 0, scales, 1)[..., None]
            codes = np.clip(np.rint(numbers / steps), -LEVELS, LEVELS)
            return {name: codes.astype(np.int8), f"{name}_scales": scales}
        return {name: numbers.astype(RAW[dtype], copy=False)}


def cast_silently(array: np.ndarray, dtype: Any) -> np.ndarray:
    """`array` in `dtype`; what does not fit becomes infinite, silently, for the finite check to find."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def widened(raw: np.ndarray) -> np.ndarray:
    """What halves of either kind stand for."""
    return decode(raw, None)


def decode(raw: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """The numbers that vectors `raw` (..., d) stand for, in the dtype they are computed with."""
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if scales is not None:
        return raw.astype(np.float32) * scales[..., None]
    return raw.astype(np.promote_types(raw.dtype, np.float32), copy=False)
