"""(F F^T + lambda I)^-1 F for a narrow basis: functions far apart share no sample, so F F^T is a band of blocks.

A block tridiagonal Cholesky factorisation costs O(N b (b + L)) with blocks of b functions, in place of O(N² (N + L)).
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.linalg import blas, lapack

from .basis import Basis

APART = 12.0  # widths between centres whose functions share nothing: exp(-12²/4) is float64's rounding
NEGLIGIBLE = 1e-17  # beside the largest entry of a block: less than its rounding
STRIP = 32  # columns that are let go together
SMALLEST = 32  # functions of a block: smaller products do not run at full speed


def block_starts(basis: Basis) -> np.ndarray | None:
    """Where blocks of functions begin, so that only neighbours overlap, with N at the end; None for no gain."""
    n = len(basis)
    if not basis.ascending:
        return None
    ends = np.searchsorted(basis.centers, basis.centers + APART * basis.widths.max(), side="right")
    width = max(int((ends - np.arange(n)).max()), SMALLEST)
    return None if 3 * width >= n else np.append(np.arange(0, n - width // 2, width), n)


class BlockGram:
    """The blocks of F F^T on and below the diagonal."""

    def __init__(self, F: np.ndarray, starts: np.ndarray):
        self.starts = starts
        blocks = [slice(a, b) for a, b in itertools.pairwise(starts)]
        self.blocks = blocks
        self.windows = [_nonzero_columns(F[rows]) for rows in blocks]
        self.diagonal = [F[r, w] @ F[r, w].T for r, w in zip(blocks, self.windows, strict=True)]
        self.below = []
        for k in range(len(blocks) - 1):
            shared = slice(self.windows[k + 1].start, max(self.windows[k].stop, self.windows[k + 1].start))
            self.below.append(F[blocks[k + 1], shared] @ F[blocks[k], shared].T)

    @property
    def trace(self) -> float:
        return float(sum(np.trace(block) for block in self.diagonal))

    @property
    def norm(self) -> float:
        """The largest sum of absolute values of a row, which no eigenvalue exceeds."""
        largest = 0.0
        for k, block in enumerate(self.diagonal):
            rows = np.abs(block).sum(axis=1)
            if k:
                rows += np.abs(self.below[k - 1]).sum(axis=1)
            if k < len(self.below):
                rows += np.abs(self.below[k]).sum(axis=0)
            largest = max(largest, float(rows.max()))
        return largest

    def solve(self, F: np.ndarray, penalty: float) -> np.ndarray | None:
        """(F F^T + penalty I)^-1 F, or None where the factorisation fails."""
        factors: list[np.ndarray] = []
        couplings: list[np.ndarray] = []
        for k, block in enumerate(self.diagonal):
            block = block + penalty * np.eye(block.shape[0])
            if k:
                block -= couplings[-1] @ couplings[-1].T
            factor, failed = lapack.dpotrf(block, lower=1, clean=1)
            if failed:
                return None
            factors.append(factor)
            if k < len(self.below):  # below L^-T, as (L^-1 below^T)^T
                couplings.append(blas.dtrsm(1.0, factor, self.below[k], side=1, lower=1, trans_a=1))
        # F^T's columns to the right of a block's window are still zero on the way down; what decays to the left of it
        # is dropped once it is below rounding, and likewise on the way up
        out = np.zeros(F.shape)
        room = [np.empty((max(f.shape[0] for f in factors), F.shape[1])) for _ in range(2)]
        seen: list[slice] = []
        for k, (rows, factor) in enumerate(zip(self.blocks, factors, strict=True)):
            within = _hull(self.windows[k], seen[-1]) if k else self.windows[k]
            part = _copied(F[rows, within], room[0])
            if k:
                _subtract(part[:, _inside(seen[-1], within)], couplings[k - 1], out[self.blocks[k - 1], seen[-1]], room)
            seen.append(_store(out, rows, within, _solved(factor, part, trans=1)))
        for k in range(len(factors) - 1, -1, -1):
            rows, within = self.blocks[k], seen[k]
            if k < len(couplings):
                above = seen[k + 1]
                within = _hull(within, above)
            part = _copied(out[rows, within], room[0])
            if k < len(couplings):
                _subtract(part[:, _inside(above, within)], couplings[k].T, out[self.blocks[k + 1], above], room)
            seen[k] = _store(out, rows, within, _solved(factors[k], part, trans=0))
        return out


def _copied(part: np.ndarray, room: np.ndarray) -> np.ndarray:
    """A contiguous copy in memory that is there already: fresh pages cost more than what is written to them."""
    copy = room.reshape(-1)[: part.size].reshape(part.shape)
    copy[...] = part
    return copy


def _subtract(part: np.ndarray, left: np.ndarray, right: np.ndarray, room: list[np.ndarray]) -> None:
    """part -= left @ right."""
    part -= np.matmul(left, right, out=room[1].reshape(-1)[: part.size].reshape(part.shape))


def _nonzero_columns(F: np.ndarray) -> slice:
    """From the first to the last column that is not zero."""
    seen = np.flatnonzero(F.any(axis=0))
    return slice(int(seen[0]), int(seen[-1]) + 1) if seen.size else slice(0, 0)


def _hull(a: slice, b: slice) -> slice:
    """From the first column of both to the last of both; an empty one counts for nothing."""
    if a.start == a.stop or b.start == b.stop:
        return b if a.start == a.stop else a
    return slice(min(a.start, b.start), max(a.stop, b.stop))


def _inside(part: slice, whole: slice) -> slice:
    """Where the columns `part` are among the columns `whole`."""
    if part.start == part.stop:
        return slice(0, 0)
    return slice(part.start - whole.start, part.stop - whole.start)


def _solved(factor: np.ndarray, part: np.ndarray, trans: int) -> np.ndarray:
    """L^-1 part (trans = 1), or L^-T part, computed in place on the transpose."""
    return blas.dtrsm(1.0, factor, part.T, side=1, lower=1, trans_a=trans, overwrite_b=1).T


def _store(out: np.ndarray, rows: slice, within: slice, part: np.ndarray) -> slice:
    """Write `part` into out[rows, within], but for outer strips of columns below rounding; the columns written."""
    bound = NEGLIGIBLE * max(part.max(initial=0.0), -part.min(initial=0.0))
    first, last = 0, part.shape[1]
    while first < last and np.abs(part[:, first : first + STRIP]).max() <= bound:
        first = min(first + STRIP, last)
    while first < last and np.abs(part[:, max(last - STRIP, first) : last]).max() <= bound:
        last = max(last - STRIP, first)
    out[rows, within.start : within.start + first] = 0
    out[rows, within.start + last : within.stop] = 0
    stored = slice(within.start + first, within.start + last)
    out[rows, stored] = part[:, first:last]
    return stored
