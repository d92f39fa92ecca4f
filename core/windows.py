"""Products with a matrix whose rows see only a window of columns, as every operator of a narrow basis does.

Rows are taken in tiles, each with the range of columns that matters to it; what is left out is bounded in advance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends.arrays import framework, namespace

TILE = 32  # rows of one product: fewer keep less, and do not run at full speed
LEFT_OUT = {4: 1e-6, 8: 1e-15}  # by itemsize: sum of |entries| left out of a row, over the largest such sum of a row

Windows = tuple[tuple[int, int, int, int], ...]


def windows(matrix: np.ndarray, itemsize: int) -> Windows:
    """Tiles (first row, last, first column, last) of `matrix` (N, L) outside which nothing matters."""
    sizes = [_sizes(matrix[first : first + TILE]) for first in range(0, matrix.shape[0], TILE)]
    bound = LEFT_OUT[itemsize] / 2 * max(largest for _, largest in sizes)
    tiles = []
    for i, (column, _) in enumerate(sizes):
        left, right = np.cumsum(column), np.cumsum(column[::-1])  # no row leaves out more
        start, end = np.searchsorted(left, bound, side="right"), np.searchsorted(right, bound, side="right")
        first, stop = i * TILE, matrix.shape[1] - int(end)
        tiles.append((first, min(first + TILE, matrix.shape[0]), int(start), max(stop, int(start))))
    kept = sum((b - a) * (d - c) for a, b, c, d in tiles)
    if kept > 0.8 * matrix.size:  # one product is faster than many that save little
        return ((0, matrix.shape[0], 0, matrix.shape[1]),)
    return tuple(tiles)


def _sizes(tile: np.ndarray) -> tuple[np.ndarray, float]:
    """The largest magnitude of every column, and the largest sum of magnitudes of a row."""
    size = np.abs(tile)
    return size.max(axis=0), float(size.sum(axis=1).max())


def multiply(matrix: Any, tiles: Windows, x: Any, addend: Any = None) -> Any:
    """matrix @ x + addend over the windows: (N, L), (..., L, e) -> (..., N, e). NumPy's addend becomes the result."""
    if len(tiles) == 1 or not on_cpu(x):
        made = matrix @ x
        if addend is not None and framework(x) == "numpy":
            made += addend
            return made
        return made if addend is None else made + addend
    if framework(x) != "numpy":
        made = namespace(x).concat([matrix[a:b, c:d] @ x[..., c:d, :] for a, b, c, d in tiles], axis=-2)
        return made if addend is None else made + addend
    if addend is not None:
        for a, b, c, d in tiles:
            if c < d:
                addend[..., a:b, :] += np.matmul(matrix[a:b, c:d], x[..., c:d, :])
        return addend
    out = np.empty((*x.shape[:-2], matrix.shape[0], x.shape[-1]), x.dtype)
    for a, b, c, d in tiles:
        np.matmul(matrix[a:b, c:d], x[..., c:d, :], out=out[..., a:b, :])
    return out


def on_cpu(x: Any) -> bool:
    """Whether many small products cost less than one large one with most of it zero."""
    return framework(x) == "numpy" or str(getattr(x, "device", "")) == "cpu"
