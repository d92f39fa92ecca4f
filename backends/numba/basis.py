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
SUMMED = 16  # masses summed in float32 before float64 takes over
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
    f = out.dtype.type
    half, nothing, beyond = f(-0.5), f(0), f(-0.5 * REACH * REACH)
    scales, peaks = 1 / widths, f(INVERSE_ROOT_2PI) / widths
    for i in range(t.size):
        position = t[i]
        for j in range(centers.size):
            z = (position - centers[j]) * scales[j]
            power = half * (z * z)
            seen = peaks[j] * exp(power)
            out[i, j] = seen if power > beyond else nothing


def expected_basis(
    mean: np.ndarray, variance: np.ndarray, centers: np.ndarray, widths: np.ndarray, density: str
) -> Any:
    if density not in ("gaussian", "truncated_gaussian"):
        return NotImplemented
    lead = np.broadcast_shapes(mean.shape, variance.shape)
    mean, variance = (plain(np.broadcast_to(a, lead)) for a in (mean, variance))
    out = np.empty((mean.size, centers.size), mean.dtype)
    centers, widths = plain(centers), plain(widths)
    weights = np.ones_like(mean)
    if density == "truncated_gaussian":
        weigh(mean, variance, weights)
    fill_expected(mean, variance, weights, centers, widths, out)
    if density == "truncated_gaussian":
        ascending = bool((np.diff(centers) >= 0).all())
        cut_to_unit(mean, variance, centers, widths, EDGE[mean.dtype.itemsize], ascending, out)
    return out.reshape(*lead, centers.size)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def fill_expected(mean, variance, weights, centers, widths, out):
    f = out.dtype.type
    one, half, nothing, beyond = f(1), f(-0.5), f(0), f(-0.5 * REACH * REACH)
    alike = (widths == widths[0]).all()  # then a query's root and quotient are the same for all functions
    for i in range(mean.size):
        m, s2 = mean[i], min(max(variance[i], f(NARROWEST)), f(WIDEST))
        weight = weights[i] * f(INVERSE_ROOT_2PI)
        if alike:
            inverse = one / (s2 + widths[0] * widths[0])
            scale, peak = half * inverse, weight * np.sqrt(inverse)
            for j in range(centers.size):
                d = m - centers[j]
                power = d * d * scale
                seen = peak * exp(power)
                out[i, j] = seen if power > beyond else nothing
        else:
            for j in range(centers.size):
                inverse = one / (s2 + widths[j] * widths[j])
                d = m - centers[j]
                power = half * (d * d * inverse)
                seen = exp(power) * np.sqrt(inverse) * weight
                out[i, j] = seen if power > beyond else nothing


@njit(cache=True, nogil=True)
def weigh(mean, variance, weights):
    """What scales a density's mass inside [0, 1] to 1."""
    for i in range(mean.size):
        weights[i] = 1 / inside(float(mean[i]), math.sqrt(min(max(float(variance[i]), NARROWEST), WIDEST)))


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def cut_to_unit(mean, variance, centers, widths, edge, ascending, out):
    """The share of each product of densities inside [0, 1]: 1 where the middle of the product is `edge` of its
    deviations from either end, as it is between two middles that far inside.
    """
    f = out.dtype.type
    widest = float(widths.max())
    for i in range(mean.size):
        m, s2 = mean[i], min(max(variance[i], f(NARROWEST)), f(WIDEST))
        reach = edge * widest
        if not reach <= m <= 1 - reach:  # the product lies nearer to the end than the function does
            reach *= math.sqrt(1 + widest * widest / float(s2))
        start, end = centers.size, centers.size
        if ascending and reach < 0.5:
            start, end = np.searchsorted(centers, reach), np.searchsorted(centers, 1 - reach)
        cut_range(m, s2, centers[:start], widths[:start], out[i, :start])
        cut_range(m, s2, centers[end:], widths[end:], out[i, end:])


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def cut_range(m, s2, centers, widths, out):
    f = out.dtype.type
    one, half, root_half = f(1), f(0.5), f(INVERSE_ROOT_2)
    for j in range(out.size):
        inverse = one / (s2 + widths[j] * widths[j])
        middle = centers[j] + (m - centers[j]) * (widths[j] * widths[j] * inverse)
        scale = root_half / (widths[j] * np.sqrt(s2 * inverse))
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
    some = np.zeros(edges.size, f)
    for i in range(mean.size):
        deviation = np.sqrt(min(max(variance[i], f(NARROWEST)), f(WIDEST)))
        scale = f(INVERSE_ROOT_2) / deviation
        weight = f(0.5) / f(inside(float(mean[i]), float(deviation))) if truncated else f(0.5)
        for j in range(edges.size):
            some[j] += weight * erf((edges[j] - mean[i]) * scale)
        if i % SUMMED == SUMMED - 1 or i == mean.size - 1:
            for j in range(edges.size):
                below[j] += some[j]
                some[j] = 0
    for j in range(out.size):
        out[j] = below[j + 1] - below[j]


@njit(cache=True, nogil=True)
def inside(mean, deviation):
    """Mass of a normal distribution inside [0, 1]."""
    scale = INVERSE_ROOT_2 / deviation
    return 0.5 * (math.erf((1 - mean) * scale) + math.erf(mean * scale))
