"""How much ridge a signal needs, from the signal itself: generalised cross-validation."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg, optimize

from ..backends.exchange import to_numpy
from .basis import Basis
from .ridge import CACHE, in_reach, transposed

GRID = np.logspace(-8, 2, 41)  # relative penalties tried before the best is refined


def validated_ridge(x: Any, basis: Basis, positions: np.ndarray) -> float:
    """The relative penalty that minimises L |X - H X|² / tr(I - H)², H the fit, over all components together.

    x (..., L, e), positions float64 (L,). One singular value decomposition F^T = U S V^T, O(L N min(L, N)), made once
    for a basis and positions; each penalty tried then costs O(N).
    Source: Golub, Heath and Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter"
    (Technometrics 1979), equation 1.3.
    """
    in_reach(basis, positions)
    key = (basis.key, positions.tobytes(), "svd")
    U, S = CACHE.get(key, lambda: _svd(basis, positions), lambda made: sum(a.nbytes for a in made))
    X = np.moveaxis(to_numpy(x).astype(np.float64), -2, 0).reshape(positions.size, -1)  # (L, ...)
    X = X / (np.abs(X).max(initial=0) or 1)  # its scale changes nothing, and no square of it leaves the range
    power = np.sum((U.T @ X) ** 2, axis=1)  # of X along each singular vector
    outside = max(float(np.sum(X * X)) - float(power.sum()), 0.0)  # of what no penalty changes
    scale = float(np.sum(S * S)) / len(basis)

    def score(log_ridge: float) -> float:
        left = 1 - S * S / (S * S + np.exp(log_ridge) * scale)  # of I - H along each
        free = max(positions.size - S.size + float(left.sum()), 1e-12)
        return positions.size * (float(np.sum(left**2 * power)) + outside) / free**2

    grid = np.log(GRID)
    best = int(np.argmin([score(g) for g in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)])
    refined = optimize.minimize_scalar(score, bounds=around, method="bounded")
    return float(np.exp(refined.x if refined.fun < score(grid[best]) else grid[best]))


def _svd(basis: Basis, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    U, S, _ = linalg.svd(transposed(basis, positions).T, full_matrices=False, check_finite=False)
    return U, S
