"""Basis functions and their expectations: each element costs one exp, and none where it would be zero anyway."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ..special import NARROWEST, WIDEST
from .fast import erf, exp

REACH = 12.0  # in widths: e^-72 of the peak is less than any sum of peaks can notice
EDGE = {4: 5.5, 8: 8.5}  # by itemsize, in deviations: farther inside [0, 1], a density has no tail outside to speak of
INVERSE_ROOT_2PI = 1 / math.sqrt(2 * math.pi)
INVERSE_ROOT_2 = 1 / math.sqrt(2)


def plain(array: np.ndarray) -> np.ndarray:
    """A flat, contiguous, writable copy: one compiled loop serves every layout."""
    return np.array(array, order="C").reshape(-1)


def gaussians(t: np.ndarray, centers: np.ndarray, widths: np.ndarray) -> np.ndarray:
    out = np.empty((t.size, centers.size), t.dtype)
    fill_gaussians(plain(t), plain(centers), plain(widths), out)
    return out.reshape(*t.shape, centers.size)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def fill_gaussians(t, centers, widths, out):
    half, reach = out.dtype.type(-0.5), out.dtype.type(REACH)
    scales, peaks = 1 / widths, out.dtype.type(INVERSE_ROOT_2PI) / widths
    nothing = out.dtype.type(0)
    for i in range(t.size):
        position = t[i]
        for j in range(centers.size):
            z = (position - centers[j]) * scales[j]
            seen = peaks[j] * exp(half * z * z)
            out[i, j] = seen if abs(z) < reach else nothing


def expected_basis(
    mean: np.ndarray, variance: np.ndarray, centers: np.ndarray, widths: np.ndarray, density: str
) -> Any:
    if density not in ("gaussian", "truncated_gaussian"):
        return NotImplemented
    lead = np.broadcast_shapes(mean.shape, variance.shape)
    mean, variance = (plain(np.broadcast_to(a, lead)) for a in (mean, variance))
    out = np.empty((mean.size, centers.size), mean.dtype)
    centers, widths = plain(centers), plain(widths)
    fill_expected(mean, variance, centers, widths, out)
    if density == "truncated_gaussian":
        near = EDGE[mean.dtype.itemsize] * float(widths.max())
        inner = np.searchsorted(centers, [near, 1 - near]) if (np.diff(centers) >= 0).all() else (centers.size, 0)
        cut_to_unit(mean, variance, centers, widths, near, *inner, out)
    return out.reshape(*lead, centers.size)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def fill_expected(mean, variance, centers, widths, out):
    f = out.dtype.type
    one, half, nothing, beyond = f(1), f(-0.5), f(0), f(REACH * REACH)
    for i in range(mean.size):
        m, s2 = mean[i], min(max(variance[i], f(NARROWEST)), f(WIDEST))
        for j in range(centers.size):
            inverse = one / (s2 + widths[j] * widths[j])
            d = m - centers[j]
            z2 = d * d * inverse
            seen = exp(half * z2) * np.sqrt(inverse) * f(INVERSE_ROOT_2PI)
            out[i, j] = seen if z2 < beyond else nothing


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def cut_to_unit(mean, variance, centers, widths, near, start, end, out):
    """The share of each product of densities inside [0, 1], over that of the density itself.

    A product is whole unless the density, or the function (before `start`, from `end` on), is `near` an end.
    """
    f = out.dtype.type
    for i in range(mean.size):
        m, s2 = mean[i], min(max(variance[i], f(NARROWEST)), f(WIDEST))
        out[i] *= f(1 / inside(float(m), math.sqrt(float(s2))))
        if near <= m <= 1 - near and start < end:
            cut_range(m, s2, centers[:start], widths[:start], out[i, :start])
            cut_range(m, s2, centers[end:], widths[end:], out[i, end:])
        else:
            cut_range(m, s2, centers, widths, out[i])


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def cut_range(m, s2, centers, widths, out):
    f = out.dtype.type
    one, half, root_half = f(1), f(0.5), f(INVERSE_ROOT_2)
    for j in range(out.size):
        share = s2 / (s2 + widths[j] * widths[j])
        middle = centers[j] + (m - centers[j]) * (one - share)
        scale = root_half / (widths[j] * np.sqrt(share))
        out[j] *= half * (erf((one - middle) * scale) + erf(middle * scale))


def histogram(mean: np.ndarray, variance: np.ndarray, edges: np.ndarray, density: str) -> Any:
    if density not in ("gaussian", "truncated_gaussian") or mean.dtype != np.float32:
        return NotImplemented
    lead = np.broadcast_shapes(mean.shape, variance.shape)
    queries = lead[-1]
    mean, variance = (plain(np.broadcast_to(a, lead)) for a in (mean, variance))
    rows = math.prod(lead[:-1])
    out = np.empty((rows, edges.size - 1), mean.dtype)
    for row in range(rows):
        of_row = slice(row * queries, (row + 1) * queries)
        sum_below(mean[of_row], variance[of_row], plain(edges), density == "truncated_gaussian", out[row])
    return out.reshape(*lead[:-1], edges.size - 1)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def sum_below(mean, variance, edges, truncated, out):
    """Mass below every edge (but for a constant) summed over queries, then the differences of neighbours."""
    f = np.float32
    below = np.zeros(edges.size)  # float64: the differences are small beside the sums
    for i in range(mean.size):
        deviation = np.sqrt(min(max(variance[i], f(NARROWEST)), f(WIDEST)))
        scale = f(INVERSE_ROOT_2) / deviation
        weight = f(0.5) / f(inside(float(mean[i]), float(deviation))) if truncated else f(0.5)
        for j in range(edges.size):
            below[j] += weight * erf((edges[j] - mean[i]) * scale)
    for j in range(out.size):
        out[j] = below[j + 1] - below[j]


@njit(cache=True, nogil=True)
def inside(mean, deviation):
    """Mass of a normal distribution inside [0, 1]."""
    scale = INVERSE_ROOT_2 / deviation
    return 0.5 * (math.erf((1 - mean) * scale) + math.erf(mean * scale))
