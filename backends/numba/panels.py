"""Keys as panels: blocks of keys transposed, so that one load brings the same component of a register full of keys.

The key in slot s stands at panels[s // lanes, :, s % lanes]; the last panels are filled up so that a tile of any shape
may read past the last key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .tile import ONE, lanes

LINE = 64  # bytes of a cache line, and of the widest register


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that start on a cache line, so that no register's worth of a panel straddles two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + LINE, np.uint8)
    first = -raw.ctypes.data % LINE
    return raw[first : first + size].view(dtype).reshape(shape)


def empty_panels(slots: int, d: int, stored: Any, computing: Any) -> np.ndarray:
    """Panels (number, d, lanes) for so many keys, kept as `stored` and computed with as `computing`."""
    wide, most = lanes(computing), ONE[0]
    count = -(-slots // (wide * most)) * most
    return aligned((count, d, wide), stored)


@njit(cache=True, nogil=True)
def place(keys, slot, panels):
    """Put keys (m, d) into the panels from `slot` on."""
    wide = panels.shape[2]
    for i in range(keys.shape[0]):
        panel, lane = (slot + i) // wide, (slot + i) % wide
        for c in range(keys.shape[1]):
            panels[panel, c, lane] = keys[i, c]


def grouped(queries: np.ndarray, size: int) -> np.ndarray:
    """Queries (q, d) in groups (number, d, size), the last filled up with zeros."""
    q, d = queries.shape
    padded = np.zeros((-(-q // size) * size, d), queries.dtype)
    padded[:q] = queries
    return np.ascontiguousarray(padded.reshape(-1, size, d).swapaxes(1, 2))
