"""(F F^T + lambda I)^-1 F for a narrow basis: functions far apart share no sample, so F F^T is a band of blocks.

A block tridiagonal Cholesky factorisation costs O(N b (b + L)) with blocks of b functions, in place of O(N² (N + L)).
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.linalg import lapack

from .basis import Basis

APART = 12.0  # widths between centres whose functions share nothing: exp(-12²/4) is float64's rounding
NEGLIGIBLE = 1e-14  # beside the largest entry of a block: not more than is lost in solving
STRIP = 32  # columns that are let go together
FEW = 8  # every so many rows show how large the others are
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
        """(F F^T + penalty I)^-1 F, or None where the factorisation fails.

        The blocks L of the factor are inverted, so that what is left are products: they are small and well conditioned.
        """
        inverses: list[np.ndarray] = []  # L^-1
        couplings: list[np.ndarray] = []  # below L^-T
        for k, block in enumerate(self.diagonal):
            block = block + penalty * np.eye(block.shape[0])
            if k:
                block -= couplings[-1] @ couplings[-1].T
            factor, failed = lapack.dpotrf(block, lower=1, clean=1)
            if failed:
                return None
            inverses.append(lapack.dtrtri(factor, lower=1)[0])
            if k < len(self.below):
                couplings.append(self.below[k] @ inverses[-1].T)
        # F^T's columns to the right of a block's window are still zero on the way down; what decays to the left of it
        # is dropped once it is below rounding, and likewise on the way up
        out = np.zeros(F.shape)
        seen: list[slice] = []
        for k, (rows, inverse, within) in enumerate(zip(self.blocks, inverses, self.windows, strict=True)):
            np.matmul(inverse, F[rows, within], out=out[rows, within])
            if k:
                _add(out, rows, -inverse @ couplings[k - 1], self.blocks[k - 1], seen[-1])
                within = _hull(within, seen[-1])
            seen.append(_kept(out, rows, within))
        for k in range(len(inverses) - 1, -1, -1):
            rows, within, left = self.blocks[k], seen[k], inverses[k].T
            out[rows, within] = left @ out[rows, within]
            if k < len(couplings):
                _add(out, rows, -left @ couplings[k].T, self.blocks[k + 1], seen[k + 1])
                within = _hull(within, seen[k + 1])
            seen[k] = _kept(out, rows, within)
        return out


def _nonzero_columns(F: np.ndarray) -> slice:
    """From the first to the last column that is not zero."""
    seen = np.flatnonzero(F.any(axis=0))
    return slice(int(seen[0]), int(seen[-1]) + 1) if seen.size else slice(0, 0)


def _hull(a: slice, b: slice) -> slice:
    """From the first column of both to the last of both; an empty one counts for nothing."""
    if a.start == a.stop or b.start == b.stop:
        return b if a.start == a.stop else a
    return slice(min(a.start, b.start), max(a.stop, b.stop))


def _add(out: np.ndarray, rows: slice, left: np.ndarray, others: slice, within: slice) -> None:
    """out[rows] += left @ out[others], in the columns `within`."""
    out[rows, within] += left @ out[others, within]


def _kept(out: np.ndarray, rows: slice, within: slice) -> slice:
    """The columns `within` of out[rows], but for outer strips below rounding, which are made zero."""
    part = out[rows, within]
    bound = NEGLIGIBLE * np.abs(part[::FEW]).max(initial=0.0)  # at most what the largest of all gives
    first, last = 0, part.shape[1]
    while first < last and np.abs(part[:, first : first + STRIP]).max() <= bound:
        first = min(first + STRIP, last)
    while first < last and np.abs(part[:, max(last - STRIP, first) : last]).max() <= bound:
        last = max(last - STRIP, first)
    part[:, :first] = 0
    part[:, last:] = 0
    return slice(within.start + first, within.start + last)
