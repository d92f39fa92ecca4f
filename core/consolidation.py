"""Making a signal longer at a fixed size: the old one is contracted and sampled, new samples follow, all is refitted.

The refit is linear, so nothing has to be sampled and solved again: B' = C B + G_new^T X with C = G_old^T Psi(samples).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.arrays import cast, framework, namespace
from ..backends.exchange import like as like_of
from . import original as published
from .basis import Basis, gaussians
from .positions import after_contraction, centred
from .ridge import CACHE, FitOperator, beside, fit_operator, held
from .windows import Windows, multiply, on_cpu, windows

AT_ONCE = 64  # samples, or functions, that one product is about
FINEST = 1 / 16  # over the mean spacing of functions: narrower ones do not ask for more samples
SPARSE, SPARSE_AT_FIRST = 1.2, 8 / 3  # widths between samples, from which on each stands for all of its room
LEAST_SHARE = 1e-12  # of [0, 1], for an old sample: keeps weights finite
RARE = 8  # times rarer than the old, from which on new samples count for as much more


@dataclass(frozen=True)
class Scheme:
    """What stays the same from one update to the next: basis, relative ridge, least samples M, and whose rules.

    Where samples are too sparse for the functions, a fit overshoots between them, and the next update makes more of it:
    without end. So the old signal is looked at once in every width of the narrowest functions at least, a new sample
    that has more room than that stands for all of it, and new samples far rarer than the old count for as much more.
    Segments about as long as M, as the paper has them, are fitted as they are.
    With `original` the positions, padding and absolute penalty are those of the authors' code.
    """

    basis: Basis
    ridge: float
    samples: int
    original: bool = False

    def looks(self, contraction: float) -> int:
        """M: at how many positions an update looks at the old signal."""
        return self.samples if self.original else max(self.samples, math.ceil(contraction / self._width))

    @functools.cached_property
    def _width(self) -> float:
        return max(float(self.basis.widths.min()), FINEST / len(self.basis))

    def first(self, length: int) -> FitOperator:
        """The operator of a first fit to `length` samples."""
        if not self.original:
            return self._fit(np.empty(0), centred(length), 1.0)
        positions, zeros = published.first_positions(length)
        return fit_operator(self.basis, positions, self.ridge, zeros, original=True)

    def later(self, contraction: float, length: int) -> FitOperator:
        """The operator of an update: M old samples in [0, contraction], then `length` new ones."""
        if not self.original:
            return self._fit(*after_contraction(contraction, self.looks(contraction), length), 1 - contraction)
        old, new, zeros = published.update_positions(contraction, self.samples, length)
        positions = published.half_open(np.concatenate([old, new]), self.basis)
        return fit_operator(self.basis, positions, self.ridge, zeros, original=True)

    def _fit(self, old: np.ndarray, new: np.ndarray, room: float) -> FitOperator:
        """The operator for samples at `old` and `new` positions, the latter evenly spread in the last `room`."""
        widths = room / new.size / self._width  # between new samples
        times = math.ceil(widths) if widths > (SPARSE if old.size else SPARSE_AT_FIRST) else 1
        copies = new if times == 1 else 1 - room + room * centred(times * new.size)
        share = max(2 * old[0], LEAST_SHARE) if old.size else 1.0  # the first stands in the middle of its own
        rarer = room / copies.size / share
        weights = np.concatenate([np.ones(old.size), np.full(copies.size, rarer)]) if rarer > RARE else None
        operator = fit_operator(self.basis, np.concatenate([old, copies]), self.ridge, weights=weights)
        return operator if times == 1 else held(operator, new.size, times)

    def old_positions(self, contraction: float) -> np.ndarray:
        """Where on the old signal the M samples stand when nothing says that one place matters more."""
        if not self.original:
            return centred(self.looks(contraction))
        return published.half_open(published.old_positions(self.samples), self.basis)

    def new_positions(self, contraction: float, length: int) -> np.ndarray:
        """Where the new samples of an update stand."""
        if self.original:
            return published.update_positions(contraction, self.samples, length)[1]
        return after_contraction(contraction, self.samples, length)[1]

    def recurrence(self, operator: FitOperator, contraction: float) -> np.ndarray:
        """C (N, N) of an update by its `operator`, float64, kept."""

        def make() -> np.ndarray:
            made, t = np.empty((len(self.basis), len(self.basis))), self.old_positions(contraction)
            for first in range(0, len(self.basis), AT_ONCE):
                some = slice(first, first + AT_ONCE)
                felt, psi = self.basis.sampled(some, t)
                np.matmul(operator.matrix[:, felt], psi, out=made[:, some])
            made.setflags(write=False)
            return made

        return CACHE.get((operator.key, self.looks(contraction), "recurrence"), make, lambda made: made.nbytes)


def apply(key: Any, matrix: np.ndarray, x: Any, addend: Any = None) -> Any:
    """matrix @ x + addend for the float64 operator known as `key`, where x is and in its dtype, over its windows.

    The addend is used up.
    """
    return multiply(beside(key, matrix, x), _windows_of(key, matrix, x), x, addend)


def _windows_of(key: Any, matrix: np.ndarray, x: Any) -> Windows:
    itemsize = 4 if "32" in str(x.dtype) else 8
    return CACHE.get((key, "windows", itemsize), lambda: windows(matrix, itemsize), lambda made: 64 * len(made))


def fitted(scheme: Scheme, x: Any) -> Any:
    """Coefficients (..., N, e) of a first fit to x (..., L, e)."""
    operator = scheme.first(x.shape[-2])
    return apply(operator.key, operator.matrix, x)


def updated(scheme: Scheme, B: Any, x: Any, contraction: float, where: Any = None) -> Any:
    """Coefficients after an update with x (..., L, e).

    `where` (..., M), ascending: as many positions of the old signal as the scheme looks at; None for even ones.
    """
    operator, M = scheme.later(contraction, x.shape[-2]), scheme.looks(contraction)
    n, e = B.shape[-2:]
    # fewer products than through a C of these positions, and no sum of two results
    if where is not None and (_narrow(scheme.basis) or n * (M + e) > 2 * M * e):
        return apply(operator.key, operator.matrix, _then(scheme.basis, B, where, x))
    new = apply((operator.key, "new", M), operator.matrix[:, M:], x)
    if where is None:
        return apply((operator.key, M, "recurrence"), scheme.recurrence(operator, contraction), B, new)
    return apply((operator.key, "old", M), operator.matrix[:, :M], scheme.basis(_beside(where, B))) @ B + new


def updated_in_bins(scheme: Scheme, B: Any, x: Any, contraction: float, points: np.ndarray, counts: np.ndarray) -> Any:
    """The same with counts[b] samples at each of D ascending points: exact, at the cost of D rows in place of M.

    points (D,), counts (..., D), whole numbers that sum to M.
    """
    operator, M = scheme.later(contraction, x.shape[-2]), scheme.looks(contraction)
    ends = np.cumsum(counts, axis=-1)  # (..., D): samples m of bin b are ends[b-1] <= m < ends[b]
    sums = np.zeros((M + 1, len(scheme.basis)))
    np.cumsum(operator.matrix[:, :M].T, axis=0, out=sums[1:])
    starts = np.concatenate([np.zeros_like(ends[..., :1]), ends[..., :-1]], axis=-1)
    aggregated = like_of(sums[ends] - sums[starts], B)  # (..., D, N)
    samples = like_of(scheme.basis(points), B) @ B  # (..., D, e)
    kept = namespace(B).matrix_transpose(aggregated) @ samples
    return kept + apply((operator.key, "new", M), operator.matrix[:, M:], x)


def evaluate(basis: Basis, B: Any, where: Any) -> Any:
    """The signal B (..., N, e) at ascending positions `where` (..., T): (..., T, e).

    On the CPU only the functions near each run of positions are made and multiplied.
    """
    return _then(basis, B, where, B[..., :0, :])


def _then(basis: Basis, B: Any, where: Any, x: Any) -> Any:
    """The signal at `where`, followed by x (..., L, e), in one array (..., T + L, e)."""
    if not isinstance(where, np.ndarray) or not _narrow(basis) or not on_cpu(B):
        return namespace(B).concat([basis(_beside(where, B)) @ B, x], axis=-2)
    T, itemsize, (centers, widths) = where.shape[-1], 4 if "32" in str(B.dtype) else 8, basis.beside(B)
    at, runs = like_of(where, B), [slice(i, min(i + AT_ONCE, T)) for i in range(0, T, AT_ONCE)]
    out = np.empty((*where.shape[:-1], T + x.shape[-2], B.shape[-1]), B.dtype) if framework(B) == "numpy" else None
    rows = []
    for row in np.ndindex(*where.shape[:-1]):
        for some in runs:
            t = where[row][some]
            near = basis.felt(t[0], t[-1], itemsize)
            psi = gaussians(at[row][some], centers[near], widths[near])
            if out is None:
                rows.append(psi @ B[row][near, ...])
            else:
                np.matmul(psi, B[row][near], out=out[row][some])
        rows.append(x[row])
    if out is not None:
        out[..., T:, :] = x
        return out
    xp = namespace(B)
    return xp.reshape(xp.concat(rows, axis=0), (*where.shape[:-1], T + x.shape[-2], B.shape[-1]))


def _beside(where: Any, B: Any) -> Any:
    """Positions in the dtype of B, and where it is: NumPy's, or there already."""
    return like_of(where, B) if isinstance(where, np.ndarray) else cast(where, B.dtype)


def _narrow(basis: Basis) -> bool:
    """Whether looking only at the functions near a position saves anything."""
    return basis.ascending and len(basis) > 2 * AT_ONCE
