"""PyTorch: the formulas with autograd. CPU tensors that need no gradient share memory with the Numba twins,
unless PyTorch itself was asked for with PERDURE_BACKEND or perdure.backend. CUDA tensors share it with the CUDA
kernels, where CuPy is there to start them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np

from .arrays import framework, namespace, optional_import
from .errors import BackendError
from .registry import current_backend, load

KERNELS_ON = {"cuda"}  # types of devices that CUDA kernels run on; tests add the CPU
OPERATORS: list[
    ModuleType
] = []  # the kernels as operators, once CuPy, which compiles and starts them, is found to work


def probe() -> None:
    """Raise MissingPackageError unless PyTorch and its array-API layer are installed."""
    torch = optional_import("torch", extra="torch")
    namespace(torch.zeros(1))
    if torch.cuda.is_available() and not OPERATORS:
        with suppress(BackendError):  # then the formulas compute on the GPU
            load("cupy")
            OPERATORS.append(importlib.import_module(".cuda.operators", __package__))


def from_numpy(array: np.ndarray, device: Any = None) -> Any:
    """A tensor on the same memory where PyTorch can take it; a copy where it cannot (read-only, negative strides)."""
    import torch

    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array).to(device or torch.get_default_device())


def to_numpy(tensor: Any) -> np.ndarray:
    """The tensor's memory as a NumPy array."""
    return tensor.numpy(force=True)


def _plain(tensors: Sequence[Any]) -> bool:
    """Whether all lie in main memory and none needs a gradient, of either mode, outside of compilation."""
    import torch

    if torch.compiler.is_compiling() or getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        return False
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not tracked and all(t.device.type == "cpu" for t in tensors)


def _through_numba(name: str, args: tuple[Any, ...]) -> Any:
    """The Numba twin on the tensors' own memory, or NotImplemented where a gradient or another device is at stake."""
    import torch

    tensors = [a for a in args if framework(a) == "torch"]
    if not _plain(tensors) or current_backend() == "torch":
        return NotImplemented
    from . import numba

    result = getattr(numba, name)(*(to_numpy(a) if framework(a) == "torch" else a for a in args))
    if result is NotImplemented:
        return result
    return tuple(map(torch.from_numpy, result)) if isinstance(result, tuple) else torch.from_numpy(result)


def _on_gpu(*tensors: Any, differentiable: bool = False) -> ModuleType | None:
    """The operators for these tensors, or None: other devices, or gradients that they do not have."""
    import torch

    if tensors[0].device.type not in KERNELS_ON or not OPERATORS:
        return None
    if not differentiable and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    return OPERATORS[0]


def retrieve(queries: Any, keys: Any, k: int, space: str, mask: Any, start: int) -> Any:
    if operators := _on_gpu(queries, keys):
        fits = operators.retrieval.retrieve_fits(queries, keys, k, mask)
        return operators.retrieve(queries, keys, k, space, mask, start) if fits else NotImplemented
    return _through_numba("retrieve", (queries, keys, k, space, mask, start))


def retrieve_stored(queries: Any, stored: Any, scales: Any, dtype: str, k: int, space: str, start: int) -> Any:
    if (operators := _on_gpu(queries)) and space == "ip":
        fits = operators.certified.fits(queries, stored, k, None, dtype)
        return operators.retrieve_stored(queries, stored, scales, dtype, k, start) if fits else NotImplemented
    return NotImplemented


def gaussians(*args: Any) -> Any:
    return _through_numba("gaussians", args)


def expected_basis(*args: Any) -> Any:
    return _through_numba("expected_basis", args)


def expected(B: Any, mean: Any, variance: Any, centers: Any, widths: Any, density: str) -> Any:
    if operators := _on_gpu(B, mean, variance, centers, widths):
        fits = operators.density.expected_fits(B, mean, variance, density)
        return operators.expected(B, mean, variance, centers, widths, density) if fits else NotImplemented
    return NotImplemented


def histogram(mean: Any, variance: Any, edges: Any, density: str) -> Any:
    if operators := _on_gpu(mean, variance, edges):
        fits = operators.density.histogram_fits(mean, variance, edges, density)
        return operators.histogram(mean, variance, edges, density) if fits else NotImplemented
    return _through_numba("histogram", (mean, variance, edges, density))


def systematic(histogram: Any, samples: int, shift: Any = 0.5) -> Any:
    tensors = [histogram, shift] if framework(shift) == "torch" else [histogram]
    if (operators := _on_gpu(*tensors)) and operators.density.systematic_fits(histogram, samples):
        whole = shift if len(tensors) == 2 else histogram.new_full((1,), shift)
        return operators.systematic(histogram, samples, whole)
    return NotImplemented


def attention(queries: Any, keys: Any, values: Any, positions: Any, scale: float, mask: Any, start: int) -> Any:
    if positions is None:
        return _fused(queries, keys, values, scale, mask)
    if operators := _on_gpu(queries, keys, values, differentiable=True):
        fits = operators.neighbours.fits(queries, keys, values, positions, mask)
        return operators.attention(queries, keys, values, positions, scale, mask, start) if fits else NotImplemented
    return _through_numba("attention", (queries, keys, values, positions, scale, mask, start))


def averaged(*args: Any) -> Any:
    return _through_numba("averaged", args)


def merged(*args: Any) -> Any:
    return _through_numba("merged", args)


def _fused(queries: Any, keys: Any, values: Any, scale: float, mask: Any) -> Any:
    """PyTorch's own fused attention where there is any; see `fused`."""
    result = fused(queries, keys, values, scale, mask, False)
    return NotImplemented if result is None else result


def fused(queries: Any, keys: Any, values: Any, scale: float, mask: Any, causal: bool) -> tuple[Any, Any] | None:
    """PyTorch's own fused attention, through the one operator on the CPU that also gives the log-sum-exp.

    `causal`: query i sees the keys up to number i. The operator is not public and has no gradient for the log-sum-exp:
    None where it is missing or does not fit.
    """
    import torch

    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    tensors = (queries, keys, values)
    if (
        operator is None
        or not _plain(tensors)
        or keys.shape[-1] != values.shape[-1]
        or 0 in (*queries.shape, *keys.shape)
    ):
        return None
    lead = np.broadcast_shapes(*(t.shape[:-2] for t in tensors))  # PyTorch's own takes four times as long
    heads = lead[-1] if lead else 1  # the operator's second axis, along which one set of keys may serve several heads
    queries, keys, values = (t.expand(*lead, *t.shape[-2:]).reshape(-1, heads, *t.shape[-2:]) for t in tensors)
    # the operator reads a vector's components as neighbours in memory, and does not check that they are
    queries, keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (queries, keys, values))
    bias = None
    if mask is not None:
        pairs = (queries.shape[-2], keys.shape[-2])
        mask = mask.expand(np.broadcast_shapes(mask.shape, pairs))
        one = mask.numel() == mask.shape[-1] * mask.shape[-2]  # for all, and not repeated
        mask = mask.reshape(1, 1, *pairs) if one else mask.expand(*lead, *pairs).reshape(-1, heads, *pairs)
        bias = torch.zeros(mask.shape, dtype=queries.dtype).masked_fill_(~mask, -torch.inf)
    output, lse = operator(queries, keys, values, 0.0, causal, attn_mask=bias, scale=scale)
    if not bool(torch.isfinite(output.sum())):  # an infinity or NaN, perhaps only where the mask forbids to look
        return None
    if mask is not None:
        lse = lse.masked_fill(~mask.any(dim=-1), -torch.inf)
    return output.reshape(*lead, *output.shape[-2:]), lse.reshape(*lead, -1)
