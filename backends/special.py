"""What is needed and the array API standard lacks, found in each framework: the error function, ranks.

Beside it the limits that formulas and their twins hold variances within, written once so that they cannot drift apart.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

from .arrays import framework, namespace
from .exchange import like, to_numpy

NARROWEST, WIDEST = 1e-12, 1e12  # variances: narrower than any basis sees, wider than [0, 1] can tell
_HOMES = {"numpy": "scipy.special", "torch": "torch.special", "cupy": "cupyx.scipy.special"}


def erf(array: Any) -> Any:
    """The error function, 2/sqrt(pi) times the integral of exp(-x²) from 0, of every element; gradients by autograd.

    A framework that only speaks the array API standard is served through NumPy, on the host.
    """
    home = framework(array)
    if home in _HOMES:
        # torch.compile traces no import, so what is imported is taken as it stands
        module = sys.modules.get(_HOMES[home]) or importlib.import_module(_HOMES[home])
        return module.erf(array)
    return like(importlib.import_module("scipy.special").erf(to_numpy(array)[...]), array)


def ranks(ends: Any, values: Any) -> Any:
    """How many of ascending `ends` (..., D) are at most each of `values` (..., M): int64 (..., M)."""
    if framework(ends) == "torch":
        import torch

        return torch.searchsorted(ends.contiguous(), values.contiguous(), right=True)
    if framework(ends) == "numpy":
        rows = [np.searchsorted(ends[row], values[row], side="right") for row in np.ndindex(*ends.shape[:-1])]
        return np.array(rows, np.int64).reshape(values.shape)
    return namespace(ends).count_nonzero(values[..., None] >= ends[..., None, :], axis=-1)
