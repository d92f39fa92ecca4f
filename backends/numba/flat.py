"""Leading axes as one: (..., a, b) <-> (batch, a, b)."""

from __future__ import annotations

import math

import numpy as np


def flatten(*arrays: np.ndarray) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """The common leading shape, and each array with it flattened to one axis; a view where strides allow."""
    leads = {a.shape[:-2] for a in arrays}
    lead = np.broadcast_shapes(*leads)
    batch = math.prod(lead)
    if len(leads) > 1:
        arrays = tuple(np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in arrays)
    return lead, [a.reshape(batch, *a.shape[-2:]) for a in arrays]
