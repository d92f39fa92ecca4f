"""Basis functions and their expectations: each element costs one exp, and none where it would be zero anyway."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

REACH = 12.0  # in widths: e^-72 of the peak is less than any sum of peaks can notice
EDGE = 8.5  # in deviations: farther inside [0, 1] than this, a density has no tail outside that float64 can tell
INVERSE_ROOT_2PI = 1 / math.sqrt(2 * math.pi)
INVERSE_ROOT_2 = 1 / math.sqrt(2)
NARROWEST, WIDEST = 1e-12, 1e12


def plain(array: np.ndarray) -> np.ndarray:
    """A flat, contiguous, writable copy: one compiled loop serves every layout."""
    return np.array(array, order="C").reshape(-1)


def gaussians(t: np.ndarray, centers: np.ndarray, widths: np.ndarray) -> np.ndarray:
    out = np.empty((t.size, centers.size), t.dtype)
    fill_gaussians(plain(t), plain(centers), plain(widths), out)
    return out.reshape(*t.shape, centers.size)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def fill_gaussians(t, centers, widths, out):
    for j in range(centers.size):
        center, scale = centers[j], 1 / widths[j]
        peak = scale * INVERSE_ROOT_2PI
        for i in range(t.size):
            z = (t[i] - center) * scale
            out[i, j] = peak * math.exp(-0.5 * z * z) if not abs(z) > REACH else 0


def expected_basis(
    mean: np.ndarray, variance: np.ndarray, centers: np.ndarray, widths: np.ndarray, density: str
) -> Any:
    if density not in ("gaussian", "truncated_gaussian"):
        return NotImplemented
    lead = np.broadcast_shapes(mean.shape, variance.shape)
    mean, variance = (plain(np.broadcast_to(a, lead)) for a in (mean, variance))
    out = np.empty((mean.size, centers.size), mean.dtype)
    fill_expected(mean, variance, plain(centers), plain(widths), density == "truncated_gaussian", out)
    return out.reshape(*lead, centers.size)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def fill_expected(mean, variance, centers, widths, truncated, out):
    for i in range(mean.size):
        m, s2 = float(mean[i]), min(max(float(variance[i]), NARROWEST), WIDEST)
        whole = inside(m, math.sqrt(s2)) if truncated else 1.0
        for j in range(centers.size):
            width = float(widths[j])
            total = s2 + width * width
            d = m - centers[j]
            z2 = d * d / total
            if z2 > REACH * REACH:
                out[i, j] = 0
                continue
            seen = math.exp(-0.5 * z2) / math.sqrt(total) * INVERSE_ROOT_2PI
            if truncated:
                share = s2 / total
                middle, deviation = centers[j] * share + m * (1 - share), width * math.sqrt(share)
                if middle < EDGE * deviation or 1 - middle < EDGE * deviation:
                    seen *= inside(middle, deviation)
                seen /= whole
            out[i, j] = seen


@njit(cache=True, nogil=True)
def inside(mean, deviation):
    """Mass of a normal distribution inside [0, 1]."""
    scale = INVERSE_ROOT_2 / deviation
    return 0.5 * (math.erf((1 - mean) * scale) + math.erf(mean * scale))
