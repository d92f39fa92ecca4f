"""What queries see that look at a signal through a density each, E[x(t)] = E[psi(t)]^T B, with no more work than shows.

A density much wider than the functions sees them blurred, and a blurred signal is known by few points. A Gaussian of
variance s² is one of variance s² - a around another of variance a: once the signal is averaged over the second, at K
places, every query sums K terms in place of N. The sum that replaces the integral is exact to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.arrays import cast, inspectable, namespace
from ..backends.exchange import like as like_of
from ..backends.exchange import to_numpy
from ..backends.special import NARROWEST, WIDEST
from . import checks
from .basis import Basis
from .consolidation import apply
from .density import checked_densities, expected, expected_basis, inside_mass, interval_mass
from .ridge import CACHE
from .signal import Signal, looked_at, weighted

ROUNDING = {4: 1.0, 8: 1.4}  # by itemsize: deviations a step that sum a Gaussian right to 2 exp(-2 pi² deviations²)
TAILS = {4: 5.5, 8: 8.5}  # by itemsize, in deviations: beyond this a Gaussian is nothing beside rounding
GAIN = 2  # how many times fewer places than functions are worth the detour


def expected_value(signal: Signal, mean: Any, variance: Any, density: str = "truncated_gaussian") -> Any:
    """What queries see that look at `signal` through a density each.

    Parameters
    ----------
    signal : Signal
        Coefficients (..., N, e).
    mean : array (..., q)
        Where each looks, in [0, 1].
    variance : array (..., q), or a number for all
        How widely; above 0, held within [1e-12, 1e12].
    density : {"truncated_gaussian", "gaussian", "sparsemax", "biweight"}

    Returns
    -------
    array (..., q, e)
        In the dtype of the signal's samples.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError

    Notes
    -----
    O(q N (1 + e)) time, O(q N) memory; where no variance is below v, for Gaussians on the CPU, with 2/sqrt(v) + 20
    in place of N, and O(N e / sqrt(v)) once. Gradients reach the coefficients, `mean` and `variance`.
    Source: ∞-former (arXiv 2109.00301), section 3.1. Differs from the paper in the default density: the paper's
    Gaussian leaves more than half of its mass outside [0, 1] before training.
    """
    B = looked_at(signal)
    mean, variance = checked_densities(mean, variance, density, signal=B)
    lead = checks.leading(signal=(B, 2), mean=(mean, 1), variance=(variance, 1))
    if signal.basis.kind == "rectangular":
        seen = interval_mass(mean, variance, *signal.basis.beside(mean, edges=True), density)
        return weighted(seen, B, signal.dtype)
    queries = math.prod(lead) * mean.shape[-1] // max(math.prod(B.shape[:-2]), 1)  # of each signal
    if few := fewer_places(signal.basis, variance, density, queries):
        return weighted(few.seen(mean, variance), few.blurred(B), signal.dtype)
    return cast(expected(B, mean, variance, *signal.basis.beside(mean), density), signal.dtype)


@dataclass(frozen=True, eq=False)
class FewerPlaces:
    """A basis as K + E functions that see through wide densities what its N would show.

    Attributes
    ----------
    basis : Basis
    variance : float
        a: what the signal is blurred by; at most half of any density's.
    places : float64 array (K,)
        Where the blurred signal is taken.
    ends : int array (E,)
        Functions so near to 0 or 1 that a density cut there cuts them too: these are kept as they are.
    matrix : float64 array (K + E, N)
        Coefficients B become matrix @ B.
    key : tuple
        What tells this from others.
    """

    basis: Basis
    variance: float
    places: np.ndarray
    ends: np.ndarray
    matrix: np.ndarray
    key: tuple[Any, ...]

    def blurred(self, B: Any) -> Any:
        """Coefficients (..., N, e) as (..., K + E, e)."""
        return apply(self.key, self.matrix, B)

    def seen(self, mean: Any, variance: Any) -> Any:
        """What takes the place of E[psi(t)], of every query: (..., q), (..., q) -> (..., q, K + E)."""
        wide = namespace(mean).clip(variance, NARROWEST, WIDEST) - self.variance
        places, points = (like_of(a, mean) for a in (self.places, np.zeros_like(self.places)))
        seen = expected_basis(mean, wide, places, points, "gaussian")
        if not self.ends.size:
            return seen
        centers, widths = (like_of(a[self.ends], mean) for a in (self.basis.centers, self.basis.widths))
        at_ends = expected_basis(mean, variance, centers, widths, "truncated_gaussian")
        return namespace(mean).concat([seen / inside_mass(mean, variance)[..., None], at_ends], axis=-1)


def fewer_places(basis: Basis, variance: Any, density: str, queries: int) -> FewerPlaces | None:
    """Fewer functions for `queries` that look with no less than the least `variance`; None where they gain nothing.

    Only where numbers can be looked at: not on a GPU, nor in a compiled graph.
    """
    if basis.kind != "gaussian" or density not in ("gaussian", "truncated_gaussian"):
        return None
    if not inspectable(variance) or 0 in variance.shape:
        return None
    itemsize = 4 if "32" in str(variance.dtype) else 8
    least = min(float(to_numpy(variance).min()), WIDEST)
    if math.isnan(least):
        return None
    least = 2.0 ** math.floor(math.log2(max(least, NARROWEST)))  # few levels serve all
    n, step = len(basis), math.sqrt(least) / 2 / ROUNDING[itemsize]
    if 1 / step * GAIN * (1 + n / max(queries, 1)) > n:
        return None
    key = (basis.key, "fewer places", least, density, itemsize)
    few: FewerPlaces = CACHE.get(key, lambda: _made(basis, least, density, itemsize, key), lambda m: m.matrix.nbytes)
    return few if few.matrix.shape[0] * GAIN * (1 + n / max(queries, 1)) <= n else None


def _made(basis: Basis, least: float, density: str, itemsize: int, key: tuple[Any, ...]) -> FewerPlaces:
    """Of two Gaussians' product, of variance (s² - a) (w² + a) / (s² + w²), no less than s²/4 is left with a = s²/2."""
    taken, squares = least / 2, basis.widths**2
    step = math.sqrt(least) / 2 / ROUNDING[itemsize]
    beyond = TAILS[itemsize] * math.sqrt(taken + float(squares.max()))  # as wide as such a product can be
    low, high = min(basis.centers.min(), 0) - beyond, max(basis.centers.max(), 1) + beyond
    places = low + step * np.arange(math.ceil((high - low) / step) + 1)
    total = squares + taken
    matrix = np.exp(-0.5 * (places[:, None] - basis.centers) ** 2 / total) * (step / np.sqrt(2 * np.pi * total))
    ends = np.zeros(0, np.int64)
    if density == "truncated_gaussian":
        reach = TAILS[itemsize] * basis.widths * np.sqrt(1 + squares / least)  # of what such a density sees of each
        ends = np.flatnonzero((basis.centers < reach) | (basis.centers > 1 - reach))
        matrix[:, ends] = 0
        matrix = np.concatenate([matrix, np.eye(len(basis))[ends]])
    for array in (places, ends, matrix):
        array.setflags(write=False)
    return FewerPlaces(basis, taken, places, ends, matrix, key)
