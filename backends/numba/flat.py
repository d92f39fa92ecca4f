"""Leading axes as one: (..., a, b) <-> (batch, a, b)."""

from __future__ import annotations

import math

import numpy as np


def flatten(*arrays: np.ndarray) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """The common leading shape, and each array with it flattened to one axis; a view where strides allow."""
    lead = np.broadcast_shapes(*(a.shape[:-2] for a in arrays))
    batch = math.prod(lead)
    flat = [np.broadcast_to(a, (*lead, *a.shape[-2:])).reshape(batch, *a.shape[-2:]) for a in arrays]
    return lead, flat
