"""Fused loops on the CPU, compiled by Numba on first use and kept on disk for the next process.

Each function here is the faster twin of the kernel of the same name in core/, which is its specification; but for
what indexes ask of a backend that has it: `exact_keys` and `make_lists` make what they keep beside the keys,
`search_lists` searches it, and `rescore` scores candidates in full; `rows_in_parallel` works on many rows at once.
"""

from .attention import attention, averaged
from .basis import expected_basis, gaussians, histogram
from .coded import exact_keys as exact_keys
from .coded import rescore as rescore
from .coded_lists import make_lists as make_lists
from .lists import search_all as search_lists  # noqa: F401
from .merged import merged
from .positions import systematic
from .retrieval import retrieve
from .threads import rows_in_parallel as rows_in_parallel
from .unit import unit

__all__ = [
    "attention",
    "averaged",
    "expected_basis",
    "gaussians",
    "histogram",
    "merged",
    "retrieve",
    "systematic",
    "unit",
]
