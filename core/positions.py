"""Where samples stand on [0, 1], and where the old signal is looked at before it is contracted."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends import kernel
from ..backends.arrays import inspectable, namespace
from ..backends.errors import ArgumentError
from ..backends.exchange import like
from ..backends.special import ranks


def centred(n: int) -> np.ndarray:
    """The midpoints of n equal parts of [0, 1], float64 (n,)."""
    return (np.arange(n) + 0.5) / n


def after_contraction(contraction: float, samples: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `samples` old samples in [0, contraction] and of n new ones in (contraction, 1], midpoints both."""
    return contraction * centred(samples), contraction + (1 - contraction) * centred(n)


def resample(histogram: Any, samples: int, rng: np.random.Generator | None = None) -> Any:
    """Positions drawn by systematic resampling from a piecewise constant density: sticky memory.

    The inverse of the cumulative histogram is read at (m + u)/samples, so that a bin with the share p of the mass gets
    floor or ceil of p·samples positions, spread evenly inside it.

    Parameters
    ----------
    histogram : float64 array (..., D)
        Mass of D equal bins of [0, 1], at least 0; rows without mass are sampled uniformly.
    samples : int
    rng : numpy.random.Generator, optional
        One u in [0, 1) a row; without it u = 1/2.

    Returns
    -------
    float64 array (..., samples)
        Ascending.

    Raises
    ------
    ArgumentError
        Negative or non-finite mass, where it can be looked at without waiting for a GPU.

    Notes
    -----
    O(samples + D) a row. Source: ∞-former (arXiv 2109.00301), section 3.3. Differs from the authors' code, which draws
    with replacement and takes each bin's left edge: at most D distinct positions, never the newest, more variance.
    """
    xp = namespace(histogram)
    if inspectable(histogram) and not bool(xp.all(xp.isfinite(histogram) & (histogram >= 0))):
        raise ArgumentError("where", "finite mass of at least 0", "other", "Pass a histogram of attention.")
    shift = 0.5 if rng is None else like(rng.random(tuple(histogram.shape[:-1]))[..., None], histogram)
    return systematic(histogram, samples, shift)


@kernel
def systematic(histogram: Any, samples: int, shift: Any = 0.5) -> Any:
    """The formula of `resample` for arrays of any framework: (..., D) -> (..., samples), ascending.

    shift (..., 1) in [0, 1), or one number for all.
    """
    xp = namespace(histogram)
    bins = histogram.shape[-1]
    peaks = xp.max(histogram, axis=-1, keepdims=True)
    one = xp.ones_like(histogram)
    mass = xp.where(peaks > 0, histogram / xp.where(peaks > 0, peaks, one[..., :1]), one)  # no sum of it overflows
    ends = xp.cumulative_sum(mass, axis=-1)
    steps = xp.arange(samples, dtype=histogram.dtype, device=histogram.device)
    wanted = (steps + shift) / samples * ends[..., -1:]
    bin_ = ranks(ends[..., :-1], wanted)  # (..., samples)
    width = xp.take_along_axis(mass, bin_, axis=-1)
    begin = xp.take_along_axis(ends, bin_, axis=-1) - width
    inside = (wanted - begin) / xp.where(width > 0, width, xp.ones_like(width))
    return (xp.astype(bin_, histogram.dtype) + xp.clip(inside, 0, 1)) / bins
