"""Fused loops on the CPU, compiled by Numba on first use and kept on disk for the next process.

Each function here is the faster twin of the kernel of the same name in core/, which is its specification. `Panels` is
what an exact index keeps beside its keys, where the backend that computes has one.
"""

from .attention import attention
from .basis import expected_basis, gaussians, histogram
from .retrieval import retrieve
from .ring import Panels

__all__ = ["Panels", "attention", "expected_basis", "gaussians", "histogram", "retrieve"]
