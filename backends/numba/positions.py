"""Systematic resampling in one walk along the cumulative mass: both the bins and what is wanted ascend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit


def systematic(histogram: np.ndarray, samples: int, shift: Any = 0.5) -> np.ndarray:
    *lead, bins = histogram.shape
    mass = np.ascontiguousarray(histogram).reshape(-1, bins)
    shifts = np.array(np.broadcast_to(shift, (*lead, 1)), histogram.dtype).reshape(-1)
    out = np.empty((math.prod(lead), samples), histogram.dtype)
    walk(mass, shifts, out)
    return out.reshape(*lead, samples)


@njit(cache=True, nogil=True, error_model="numpy")
def walk(histogram, shifts, out):
    f = out.dtype.type
    bins, samples = histogram.shape[1], out.shape[1]
    mass, ends = np.empty(bins, out.dtype), np.empty(bins, out.dtype)
    for row in range(out.shape[0]):
        peak = histogram[row].max()
        total = f(0)
        for b in range(bins):
            mass[b] = histogram[row, b] / peak if peak > 0 else f(1)
            total += mass[b]
            ends[b] = total
        b = 0
        for m in range(samples):
            wanted = (f(m) + shifts[row]) / f(samples) * total
            while b < bins - 1 and ends[b] <= wanted:
                b += 1
            inside = (wanted - (ends[b] - mass[b])) / mass[b] if mass[b] > 0 else f(0)
            out[row, m] = (f(b) + min(max(inside, f(0)), f(1))) / f(bins)
