"""Several readings become one, each passed over once and nothing of their size made beside the result."""

from __future__ import annotations

import numpy as np
from numba import njit


def merged(*parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shape, dtype = parts[0].shape, parts[0].dtype
    lses = np.stack(parts[1::2], axis=-1).reshape(-1, len(parts) // 2)
    weights, lse = np.empty(lses.shape, dtype), np.empty(len(lses), dtype)
    share(lses, weights, lse)
    output = np.zeros((len(lses), shape[-1]), dtype)
    for i, part in enumerate(parts[::2]):
        add(np.ascontiguousarray(part).reshape(output.shape), lses, weights, i, output)
    return output.reshape(shape), lse.reshape(shape[:-1])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def share(lses, weights, lse):
    """Each reading's part of the whole in weights (n, readings), and the whole's log-sum-exp."""
    for i in range(lses.shape[0]):
        top, total = -np.inf, 0.0
        for number in lses[i]:
            top = max(top, number)
        for j in range(lses.shape[1]):
            weights[i, j] = np.exp(lses[i, j] - top) if lses[i, j] != -np.inf else 0
            total += weights[i, j]
        for j in range(lses.shape[1]):
            weights[i, j] /= total if total != 0 else 1
        lse[i] = top + np.log(total) if total != 0 else -np.inf


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def add(part, lses, weights, j, output):
    """Reading j's `part` (n, width), by its weight, where it read anything: what is there otherwise may be NaN."""
    for i in range(part.shape[0]):
        if lses[i, j] != -np.inf:
            for c in range(part.shape[1]):
                output[i, c] += weights[i, j] * part[i, c]
