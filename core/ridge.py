"""The ridge fit B = G^T X: a float64 factorisation made once, for all who fit one basis at the same positions.

G = F^T (F F^T + lambda I)^-1, with F (N, L) the basis at the positions; its transpose is kept, as (N, L). The float32
inverse of the original code recalls a signal 5 to 15 % wrong at N = 1024; float64 rounded once at the end does not.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import linalg

from ..backends.arrays import computing_dtype, framework
from ..backends.errors import ArgumentError
from ..backends.exchange import like as like_of
from .banded import BlockGram, block_starts
from .basis import Basis

CACHE_BYTES = 256 * 2**20  # what all cached operators may hold together; the least recently used leave first
WELL_CONDITIONED = 1e8  # of F F^T + lambda I: up to here Cholesky, beyond it QR, which sees the square root only
HOPELESS = 1e20  # of F F^T + lambda I: beyond it QR keeps fewer than six digits
AT_ONCE = 64  # positions at which the basis is made at a time
REACH = 4.0  # a sample farther than this many widths from every centre would be lost


class Cache:
    """Values by key, at most `limit` bytes of them; the least recently used leave first. Safe between threads."""

    def __init__(self, limit: int):
        self.limit, self.nbytes = limit, 0
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The value under `key`, made now if it is not held; one larger than the limit is handed out, not held."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            value = make()
            nbytes = size(value)
            if nbytes <= self.limit:
                self._held[key] = value, nbytes
                self.nbytes += nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._held.popitem(last=False)[1][1]
            return value

    def start_anew(self) -> None:
        """Empty, with a lock of its own: for a forked child, where no thread may be left to free the old one."""
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Let everything go."""
        with self._lock:
            self._held.clear()
            self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)


CACHE = Cache(CACHE_BYTES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CACHE.start_anew)


@dataclass(frozen=True, eq=False)
class FitOperator:
    """How samples become coefficients: B = matrix @ X.

    Attributes
    ----------
    matrix : float64 array (N, L)
        G^T, read-only.
    penalty : float
        lambda, as added to F F^T.
    condition : float
        Estimate of the condition of F F^T + lambda I, or a bound on it.
    degrees_of_freedom : float
        tr(G F): how many independent numbers of a signal survive the fit.
    key : tuple
        What tells this operator from another.
    """

    matrix: np.ndarray
    penalty: float
    condition: float
    degrees_of_freedom: float
    key: Hashable


def beside(key: Hashable, matrix: np.ndarray, like: Any) -> Any:
    """The float64 `matrix` known as `key`, as an array beside `like` in its computing dtype; made once and kept."""
    dtype = computing_dtype(like)
    place = (key, framework(like), str(dtype), str(like.device))
    itemsize = 4 if "32" in str(dtype) else 8
    return CACHE.get(place, lambda: like_of(matrix, like, dtype), lambda _: matrix.size * itemsize)


def fit_operator(
    basis: Basis,
    positions: np.ndarray,
    ridge: float,
    zeros: np.ndarray | None = None,
    original: bool = False,
    weights: np.ndarray | None = None,
) -> FitOperator:
    """The operator that fits `basis` to samples at `positions`, from the cache where it was made before.

    Parameters
    ----------
    basis : Basis
    positions : float64 array (L,)
    ridge : float
        lambda over tr(F F^T)/N, the mean square of a basis function over the samples; at least 1e-4 bounds the
        condition by 1 + N/ridge.
    zeros : float64 array (Z,), optional
        Further positions, at which the signal is held to zero.
    original : bool
        `ridge` is lambda itself, and samples out of reach of every function are let go: the rules of the authors' code.
    weights : float64 array (L,), optional
        How much the squared error of each sample counts; all alike by default.

    Returns
    -------
    FitOperator

    Raises
    ------
    ArgumentError
        A sample that no function reaches, or a system so nearly singular that no fit would mean anything.

    Notes
    -----
    O(N² (N + L)) time the first time, 8 N L bytes. Source: ∞-former (arXiv 2109.00301), equations 5 and 6. Differs
    from the paper in the penalty's scale, unless `original`.
    """
    others = (None if a is None else a.tobytes() for a in (zeros, weights))
    key = (basis.key, positions.tobytes(), ridge, original, *others)
    return CACHE.get(
        key, lambda: _factorise(basis, positions, ridge, zeros, original, weights, key), lambda made: made.matrix.nbytes
    )


def held(operator: FitOperator, samples: int, times: int) -> FitOperator:
    """The operator for samples of which the last `samples` each stand for `times` columns."""

    def make() -> FitOperator:
        first = operator.matrix.shape[1] - times * samples
        sums = operator.matrix[:, first:].reshape(-1, samples, times).sum(axis=2)
        matrix = np.concatenate([operator.matrix[:, :first], sums], axis=1)
        matrix.setflags(write=False)
        freedom = min(operator.degrees_of_freedom, matrix.shape[1])
        return replace(operator, matrix=matrix, degrees_of_freedom=freedom, key=(operator.key, "held", samples, times))

    return CACHE.get((operator.key, "held", samples, times), make, lambda made: made.matrix.nbytes)


def _factorise(
    basis: Basis,
    positions: np.ndarray,
    ridge: float,
    zeros: np.ndarray | None,
    original: bool,
    weights: np.ndarray | None,
    key: Hashable,
) -> FitOperator:
    if not original:
        in_reach(basis, positions)
    F = transposed(basis, positions)  # (N, L)
    if weights is not None:
        F *= np.sqrt(weights)
    made = None if original else _by_blocks(basis, F, ridge)
    if made is None:
        everywhere = F if zeros is None else np.concatenate([F, basis(zeros).T], axis=1)  # (N, L + Z)
        gram = everywhere @ everywhere.T  # (N, N)
        penalty = ridge if original else ridge * float(np.trace(gram)) / len(basis)
        gram[np.diag_indices_from(gram)] += penalty
        matrix, condition = _cholesky(gram, F)
        if matrix is None:
            matrix, condition = _qr(everywhere, positions.size, penalty)
    else:
        matrix, penalty, condition = made
    freedom = float(np.vdot(matrix, F))
    if weights is not None:
        matrix *= np.sqrt(weights)
    matrix.setflags(write=False)
    return FitOperator(matrix, penalty, condition, freedom, key)


def transposed(basis: Basis, positions: np.ndarray) -> np.ndarray:
    """F (N, L), made a few positions at a time: turning all of it over at once would miss every cache."""
    F = np.zeros((len(basis), positions.size))
    for first in range(0, positions.size, AT_ONCE):
        some = slice(first, first + AT_ONCE)
        near, psi = basis.near(positions[some])
        F[near, some] = psi.T
    return F


def _by_blocks(basis: Basis, F: np.ndarray, ridge: float) -> tuple[np.ndarray, float, float] | None:
    """(matrix, penalty, bound on the condition) over the band of F F^T; None where it is none, or ill conditioned."""
    starts = block_starts(basis)
    if starts is None or ridge == 0:
        return None
    gram = BlockGram(F, starts)
    penalty = ridge * gram.trace / len(basis)
    condition = 1 + gram.norm / penalty
    matrix = gram.solve(F, penalty) if condition <= WELL_CONDITIONED else None
    return None if matrix is None else (matrix, penalty, condition)


def in_reach(basis: Basis, positions: np.ndarray) -> None:
    """Raise unless some function sees every sample: one that none sees would be lost without a word."""
    order = np.argsort(basis.centers)
    centers, widths = basis.centers[order], basis.widths[order]
    reach = REACH * widths if basis.kind == "gaussian" else widths / 2 * (1 + 1e-9)
    # intervals seen, merged left to right: a sample is seen where more intervals have begun than ended
    begun = np.searchsorted(np.sort(centers - reach), positions, side="right")
    ended = np.searchsorted(np.sort(centers + reach), positions, side="left")
    lost = positions[begun <= ended]
    if lost.size:
        raise ArgumentError(
            "positions",
            f"samples within {REACH:g} widths of a basis function",
            f"{lost.size} of {positions.size} out of reach of all, the first at {lost[0]:.4g}",
            "Widen the basis functions or take more of them; these samples would be lost.",
        )


def _cholesky(gram: np.ndarray, F: np.ndarray) -> tuple[np.ndarray | None, float]:
    """(gram^-1 F, condition), or (None, condition) where Cholesky would lose too many digits."""
    norm = float(np.abs(gram).sum(axis=0).max())
    factor, failed = linalg.lapack.dpotrf(gram, lower=1)
    if failed:
        return None, np.inf
    inverse_condition, _ = linalg.lapack.dpocon(factor, norm, uplo="L")
    condition = 1 / max(float(inverse_condition), 1e-300)
    if condition > WELL_CONDITIONED:
        return None, condition
    matrix, _ = linalg.lapack.dpotrs(factor, F, lower=1)
    return np.ascontiguousarray(matrix), condition


def _qr(F: np.ndarray, samples: int, penalty: float) -> tuple[np.ndarray, float]:
    """The same by QR of [F^T; sqrt(lambda) I], whose condition is only the square root."""
    n = F.shape[0]
    stacked = np.concatenate([F.T, np.sqrt(penalty) * np.eye(n)]) if penalty > 0 else F.T  # (L + N, N)
    condition = np.inf
    if stacked.shape[0] >= n:
        Q, R = linalg.qr(stacked, mode="economic", check_finite=False)
        root = float(linalg.lapack.dtrcon(R, norm="1", uplo="U")[0])
        condition = 1 / max(root, 1e-154) ** 2
    if not condition < HOPELESS:
        raise ArgumentError(
            "ridge",
            f"a penalty that keeps the condition below {HOPELESS:.0e}",
            f"a condition of {condition:.1e} with {samples} samples for {n} functions",
            "Raise ridge (1e-4 is safe for any basis), or take fewer or narrower functions.",
        )
    return np.ascontiguousarray(linalg.solve_triangular(R, Q[:samples].T, check_finite=False)), condition
