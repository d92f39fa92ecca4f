"""Where samples stand on [0, 1], and where the old signal is looked at before it is contracted."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends.errors import ArgumentError


def centred(n: int) -> np.ndarray:
    """The midpoints of n equal parts of [0, 1], float64 (n,)."""
    return (np.arange(n) + 0.5) / n


def after_contraction(contraction: float, samples: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `samples` old samples in [0, contraction] and of n new ones in (contraction, 1], midpoints both."""
    return contraction * centred(samples), contraction + (1 - contraction) * centred(n)


def resample(histogram: np.ndarray, samples: int, rng: np.random.Generator | None = None) -> np.ndarray:
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
        Negative or non-finite mass.

    Notes
    -----
    O(samples + D) a row. Source: ∞-former (arXiv 2109.00301), section 3.3. Differs from the authors' code, which draws
    with replacement and takes each bin's left edge: at most D distinct positions, never the newest, more variance.
    """
    if not (np.isfinite(histogram).all() and (histogram >= 0).all()):
        raise ArgumentError("where", "finite mass of at least 0", "other", "Pass a histogram of attention.")
    lead, bins = histogram.shape[:-1], histogram.shape[-1]
    peaks = histogram.max(axis=-1, keepdims=True)
    mass = histogram / np.where(peaks > 0, peaks, 1)  # no sum of it overflows
    mass = np.where(peaks > 0, mass, 1.0).reshape(-1, bins)
    shift = np.full(lead, 0.5) if rng is None else rng.random(lead)
    drawn = np.empty((mass.shape[0], samples))
    edges = np.arange(bins + 1) / bins
    for row, (p, u) in enumerate(zip(mass, shift.reshape(-1), strict=True)):
        cumulative = np.concatenate([[0.0], np.cumsum(p)])
        wanted = (np.arange(samples) + u) / samples * cumulative[-1]
        bin_ = np.clip(np.searchsorted(cumulative, wanted, side="right") - 1, 0, bins - 1)
        inside = (wanted - cumulative[bin_]) / np.where(p[bin_] > 0, p[bin_], 1)
        drawn[row] = edges[bin_] + np.clip(inside, 0, 1) / bins
    return np.clip(drawn, 0, 1).reshape(*lead, samples)


def fraction(argument: str, value: Any) -> float:
    """`value` as a float strictly between 0 and 1.

    Raises
    ------
    ArgumentError
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < 1:
        raise ArgumentError(argument, "a number strictly between 0 and 1", repr(value), f"Pass {argument}=0.5.")
    return number
