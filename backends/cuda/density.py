"""What queries see of a signal, where they looked, and what is kept of it: what those kernels can take, and how."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import framework, name_of, namespace
from .launch import MOST_BLOCKS, contiguous, empty, launch, shared_or_flat

QUERIES, COLUMNS, THREADS = 32, 64, 128  # as in the .cu files
MOST_BINS = 1024  # as in systematic.cu
GAUSSIANS = ("gaussian", "truncated_gaussian")
DENSITIES = ("truncated_gaussian", "gaussian", "sparsemax", "biweight")  # in the order of histogram.cu
NARROWEST, WIDEST = 1e-12, 1e12  # variances
BLOCKS, SHORTEST = 256, 64  # blocks that fill a GPU, for which queries are counted in runs of at least so many


def expected(B: Any, mean: Any, variance: Any, centers: Any, widths: Any, density: str) -> Any:
    if not expected_fits(B, mean, variance, density):
        return NotImplemented
    N, e = B.shape[-2:]
    lead, q = _shape(B, mean, variance)
    columns, batch = -(-e // COLUMNS), math.prod(lead)
    mean, variance = _looks(mean, variance, (*lead, q))
    B, B_batch = shared_or_flat(B, lead)
    out = empty((batch, q, e), mean.dtype, mean)
    sizes = *map(np.int32, (q, N, e, density == "truncated_gaussian")), B_batch
    grid = -(-q // QUERIES), columns, batch
    functions = contiguous(centers), contiguous(widths)
    launch("expect.cu", f"expect_{name_of(mean.dtype)}", grid, THREADS, B, mean, variance, *functions, out, *sizes)
    return out.reshape((*lead, q, e))


def expected_fits(B: Any, mean: Any, variance: Any, density: str) -> bool:
    lead, q = _shape(B, mean, variance)
    blocks = max(-(-B.shape[-1] // COLUMNS), math.prod(lead))
    return density in GAUSSIANS and 0 not in (*lead, q, *B.shape[-2:]) and blocks <= MOST_BLOCKS


def _shape(B: Any, mean: Any, variance: Any) -> tuple[tuple[int, ...], int]:
    """Leading axes, and how many queries look."""
    *lead, q = np.broadcast_shapes(tuple(mean.shape), tuple(variance.shape))
    return np.broadcast_shapes(tuple(B.shape[:-2]), tuple(lead)), q


def histogram(mean: Any, variance: Any, edges: Any, density: str) -> Any:
    if not histogram_fits(mean, variance, edges, density):
        return NotImplemented
    *lead, q = np.broadcast_shapes(tuple(mean.shape), tuple(variance.shape))
    bins, batch = edges.shape[-1] - 1, math.prod(lead)
    mean, variance = _looks(mean, variance, (*lead, q))
    runs = max(min(-(-BLOCKS // batch), q // SHORTEST), 1)
    sums = empty((batch, runs, bins), mean.dtype, mean)
    sizes = map(np.int32, (q, bins, -(-q // runs), DENSITIES.index(density)))
    kernel = f"histogram_{name_of(mean.dtype)}"
    launch("histogram.cu", kernel, (runs, batch, 1), THREADS, mean, variance, contiguous(edges), sums, *sizes)
    return namespace(mean).sum(sums, axis=1).reshape((*lead, bins))


def histogram_fits(mean: Any, variance: Any, edges: Any, density: str) -> bool:
    *lead, q = np.broadcast_shapes(tuple(mean.shape), tuple(variance.shape))
    return density in DENSITIES and 0 not in (*lead, q, edges.shape[-1] - 1) and math.prod(lead) <= MOST_BLOCKS


def systematic(histogram: Any, samples: int, shift: Any) -> Any:
    if not systematic_fits(histogram, samples):
        return NotImplemented
    *lead, bins = histogram.shape
    if framework(shift) is None:
        shift = namespace(histogram).full((*lead, 1), shift, dtype=histogram.dtype, device=histogram.device)
    shift = contiguous(namespace(histogram).broadcast_to(shift, (*lead, 1)))
    out = empty((*lead, samples), histogram.dtype, histogram)
    kernel, grid = f"systematic_{name_of(histogram.dtype)}", (math.prod(lead), 1, 1)
    launch("systematic.cu", kernel, grid, THREADS, contiguous(histogram), shift, out, *map(np.int32, (bins, samples)))
    return out


def systematic_fits(histogram: Any, samples: int) -> bool:
    return histogram.shape[-1] <= MOST_BINS and 0 not in (*histogram.shape, samples)


def _looks(mean: Any, variance: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Both broadcast and contiguous, with variances held in the range that is computed with."""
    xp = namespace(mean)
    variance = xp.clip(variance, NARROWEST, WIDEST)
    return contiguous(xp.broadcast_to(mean, shape)), contiguous(xp.broadcast_to(variance, shape))
