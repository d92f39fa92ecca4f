"""PyTorch: the formulas with autograd. CPU tensors that need no gradient share memory with the Numba twins,
unless PyTorch itself was asked for with PERDURE_BACKEND or perdure.backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import framework, namespace, optional_import
from .registry import current_backend


def probe() -> None:
    """Raise MissingPackageError unless PyTorch and its array-API layer are installed."""
    torch = optional_import("torch", extra="torch")
    namespace(torch.zeros(1))


def from_numpy(array: np.ndarray, device: Any = None) -> Any:
    """A tensor on the same memory where PyTorch can take it; a copy where it cannot (read-only, negative strides)."""
    import torch

    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array).to(device or torch.get_default_device())


def to_numpy(tensor: Any) -> np.ndarray:
    """The tensor's memory as a NumPy array."""
    return tensor.detach().cpu().numpy()


def _through_numba(name: str, args: tuple[Any, ...]) -> Any:
    """The Numba twin on the tensors' own memory, or NotImplemented where a gradient or another device is at stake."""
    import torch

    tensors = [a for a in args if framework(a) == "torch"]
    needs_torch = any(t.device.type != "cpu" or (torch.is_grad_enabled() and t.requires_grad) for t in tensors)
    if needs_torch or torch.compiler.is_compiling() or current_backend() == "torch":
        return NotImplemented
    from . import numba

    result = getattr(numba, name)(*(to_numpy(a) if framework(a) == "torch" else a for a in args))
    if result is NotImplemented:
        return result
    return tuple(map(torch.from_numpy, result)) if isinstance(result, tuple) else torch.from_numpy(result)


def retrieve(*args: Any) -> Any:
    return _through_numba("retrieve", args)


def attention(*args: Any) -> Any:
    return _through_numba("attention", args)


def gaussians(*args: Any) -> Any:
    return _through_numba("gaussians", args)


def expected_basis(*args: Any) -> Any:
    return _through_numba("expected_basis", args)
