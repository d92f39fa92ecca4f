"""Fused loops on the CPU, compiled by Numba on first use and kept on disk for the next process.

Each function here is the faster twin of the kernel of the same name in core/, which is its specification; but for
`exact_keys` and `Lists`, which make what an index keeps beside its keys, where the backend that computes has such.
"""

from .attention import attention
from .basis import expected_basis, gaussians, histogram
from .coded import exact_keys as exact_keys
from .lists import Lists
from .retrieval import retrieve
from .unit import unit

__all__ = ["Lists", "attention", "expected_basis", "gaussians", "histogram", "retrieve", "unit"]
