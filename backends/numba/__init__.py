"""Fused loops on the CPU, compiled by Numba on first use and kept on disk for the next process.

Each function here is the faster twin of the kernel of the same name in core/, which is its specification.
"""

from .attention import attention
from .basis import expected_basis, gaussians
from .retrieval import retrieve

__all__ = ["attention", "expected_basis", "gaussians", "retrieve"]
