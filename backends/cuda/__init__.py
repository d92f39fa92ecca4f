"""CUDA C++ on NVIDIA GPUs, compiled by NVRTC at the first use: twins of kernels in core/ that CuPy and PyTorch share.

Each `.cu` file is one concept, and includes no file but the `.cuh` ones here; beside it stand the functions that check
what it can take and start it. They take the arrays of any framework that `launch` knows how to address, without copying
them.
"""

from .density import expected, histogram, systematic
from .neighbours import attention, attention_backward
from .retrieval import retrieve, retrieve_stored, unit
from .texts import fingerprint, source, sources

__all__ = [
    "attention",
    "attention_backward",
    "expected",
    "fingerprint",
    "histogram",
    "retrieve",
    "retrieve_stored",
    "source",
    "sources",
    "systematic",
    "unit",
]
