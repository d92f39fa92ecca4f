"""Positions as the authors of the ∞-former's published code chose them, for results that must equal theirs.

Differs from this library's own in three ways: the first fit is embedded in zeros as long as the signal on either side,
positions of an update stand at the right edges of their parts (in float32), and sticky samples at the left edges of
their bins.
"""

from __future__ import annotations

import numpy as np

from .basis import Basis

BINS = 128


def first_positions(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the samples of a first fit, and of the zeros around them."""
    if length % 2 == 0:
        everywhere = -0.5 + (np.arange(2 * length) + 0.5) / length
        first = length // 2
    else:
        everywhere = -0.5 + (1 + np.arange(2 * length - 1)) / length
        first = (length - 1) // 2
    inside = slice(first, first + length)
    return everywhere[inside], np.delete(everywhere, inside)


def old_positions(samples: int) -> np.ndarray:
    """Where the old signal is sampled: m/M, m = 1 ... M."""
    return (np.arange(1, samples + 1, dtype=np.float32) / np.float32(samples)).astype(np.float64)


def update_positions(contraction: float, samples: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the old samples, of the new ones, and of the zeros, of an update."""
    new = contraction + np.float32(1 - contraction) * np.arange(1, length + 1, dtype=np.float32) / np.float32(length)
    old = np.float32(contraction) * np.arange(1, samples + 1, dtype=np.float32) / np.float32(samples)
    shift = 1 / (2 * length + samples)
    around = np.linspace(-0.5 + shift, 1.5 - shift, 2 * (length + samples)).astype(np.float32)
    zeros = around[(around < 0) | (around > 1)]
    return old.astype(np.float64), new.astype(np.float64), zeros.astype(np.float64)


def counts_of_draws(draws: np.ndarray) -> np.ndarray:
    """How often each of the 128 bins was drawn: bin indices (..., M) -> (..., 128)."""
    return (draws[..., None] == np.arange(BINS)).sum(axis=-2)


def left_edges() -> np.ndarray:
    """Where a sample of each bin is taken, (128,)."""
    return np.arange(BINS) / BINS


def edges() -> np.ndarray:
    """Between which the attention of each bin is summed, (129,): the outer ones lie a little outside [0, 1]."""
    made = np.arange(BINS + 1) / BINS
    made[0], made[-1] = -1e-6, 1 + 1e-6
    return made


def half_open(positions: np.ndarray, basis: Basis) -> np.ndarray:
    """`positions`, but for a 1 on a rectangular basis: there the last bin leaves its right edge to no bin at all."""
    if basis.kind != "rectangular":
        return positions
    return np.where(positions >= 1, np.nextafter(1, 2), positions)
