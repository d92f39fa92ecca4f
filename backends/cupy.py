"""CuPy: the formulas on an NVIDIA or AMD GPU, and CUDA C++ where they are slow. NumPy inputs travel there and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import optional_import
from .cuda import attention, expected, histogram, retrieve, retrieve_stored, systematic, unit
from .errors import BackendError

__all__ = [
    "attention",
    "expected",
    "from_numpy",
    "histogram",
    "probe",
    "retrieve",
    "retrieve_stored",
    "systematic",
    "to_numpy",
    "unit",
]


def probe() -> None:
    """Raise unless CuPy is installed and a GPU really computes: importing CuPy succeeds on machines without one."""
    cupy = optional_import("cupy", extra="cupy")
    optional_import("array_api_compat.cupy", extra="cupy")
    try:
        ones = cupy.ones(8)
        working = float(ones.sum()) == 8.0
    except Exception as error:  # the driver's absence surfaces as any of a dozen classes of CuPy's and CUDA's
        raise BackendError(
            "cupy",
            "a GPU that computes",
            f"{type(error).__name__}: {error}",
            "Check the driver with nvidia-smi, or choose another backend in PERDURE_BACKEND.",
        ) from error
    if not working:
        raise BackendError("cupy", "a GPU that computes", "a wrong sum", "Check the driver and the CuPy build.")


def from_numpy(array: np.ndarray, device: Any = None) -> Any:
    """A copy on `device`, or on the current one."""
    import cupy

    with cupy.cuda.Device() if device is None else device:
        return cupy.asarray(array)


def to_numpy(array: Any) -> np.ndarray:
    """A copy in host memory."""
    import cupy

    return cupy.asnumpy(array)
