"""Fused loops on the CPU, compiled by Numba on first use and kept on disk for the next process.

Each function here is the faster twin of the kernel of the same name in core/, which is its specification; but for
`exact_keys`, which makes what an exact index keeps beside its keys, where the backend that computes has such a thing.
"""

from .attention import attention
from .basis import expected_basis, gaussians, histogram
from .coded import exact_keys
from .retrieval import retrieve

__all__ = ["attention", "exact_keys", "expected_basis", "gaussians", "histogram", "retrieve"]
