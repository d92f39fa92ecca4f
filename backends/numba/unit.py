"""Vectors at norm 1, each computed by itself in the order of its components: its bits do not depend on the others."""

from __future__ import annotations

import numpy as np
from numba import njit


def unit(vectors: np.ndarray) -> np.ndarray:
    """`vectors` (..., d) at norm 1; zero vectors stay zero."""
    flat = np.ascontiguousarray(vectors).reshape(-1, vectors.shape[-1]) if vectors.size else vectors
    made = np.empty(flat.shape, flat.dtype)
    if vectors.size:
        normalise(flat, made)
    return made.reshape(vectors.shape)


@njit(cache=True, nogil=True)
def normalise(vectors, made):
    """Scaled by the largest component first, so that neither tiny nor huge norms lose their direction."""
    for i in range(vectors.shape[0]):
        largest = vectors.dtype.type(0)
        for c in range(vectors.shape[1]):
            largest = max(largest, abs(vectors[i, c]))
        square = vectors.dtype.type(0)
        for c in range(vectors.shape[1]):
            made[i, c] = vectors[i, c] / largest if largest > 0 else vectors.dtype.type(0)
            square += made[i, c] * made[i, c]
        norm = np.sqrt(square)
        for c in range(vectors.shape[1]):
            if norm > 0:
                made[i, c] /= norm
