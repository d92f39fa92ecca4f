"""Compression of c old states into one, five ways: what a Compressive Transformer does with what its memory evicts.

Source: Rae et al., "Compressive Transformers for Long-Range Sequence Modelling" (ICLR 2020, arXiv 1911.05507),
section 3.2. Each block of c neighbours is compressed by itself, so that results do not depend on how the states came.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..backends.arrays import cast, computing_dtype, framework, inspectable, known_framework, namespace
from ..backends.errors import ArgumentError, ShapeError
from . import checks

METHODS = ("mean", "max", "conv", "dilated", "most_used")


def compress(x: Any, rate: int, method: str = "mean", weights: tuple[Any, ...] = (), usage: Any = None) -> Any:
    """Every block of `rate` states as one.

    Parameters
    ----------
    x : array (..., n, d)
        n a multiple of `rate`, the oldest first.
    rate : int
        c.
    method : {"mean", "max", "conv", "dilated", "most_used"}
    weights : tuple of arrays (...)
        For "conv" a kernel (d, d, c) and a bias (d,), laid out [out, in, place]; for "dilated" a kernel
        (layers, d, d, 2) and a bias (layers, d), with layers = ceil(log2 c).
    usage : array (..., n), optional
        For "most_used": how much attention each state drew; its leading axes are those of x, or broadcast to them.

    Returns
    -------
    array (..., n/c, d)

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError
    NonFiniteError
        Usage of NaN or infinity, or summaries beyond the range of the dtype of x.

    Notes
    -----
    Computed in the widest dtype of x and the weights, at least float32, and returned in that of x. O(n d) for pooling
    and selection, O(n d²) for convolutions. Gradients reach x and the weights.
    Source: Compressive Transformers (arXiv 1911.05507), section 3.2; "dilated" has kernels of 2 and a ReLU between
    layers, which the paper leaves open.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> perdure.compress(np.arange(8.0)[:, None], rate=4).ravel()
    array([1.5, 5.5])
    """
    rate = checks.count("rate", rate)
    checks.choice("method", method, METHODS)
    checks.floating_arrays(x=x, usage=usage)
    checks.shape("x", x, "n", "d")
    n, d = x.shape[-2:]
    if n % rate:
        raise ShapeError(
            "x", f"a multiple of {rate} states", str(tuple(x.shape)), "Hold the rest back until it is one."
        )
    weights = checked_weights(method, rate, d, weights)
    checks.floating_arrays(x=x, **_named(weights))
    if method == "most_used":
        if usage is None:
            raise ArgumentError("usage", "an array (..., n) for most_used", "None", "Pass the attention states drew.")
        checks.shape("usage", usage, n)
        lead = x.shape[:-2]
        if checks.leading(x=(x, 2), usage=(usage, 1)) != tuple(lead) or usage.ndim > x.ndim - 1:
            raise ShapeError("usage", f"what broadcasts to {(*lead, n)}", str(tuple(usage.shape)), "Reshape it.")
        if inspectable(usage):
            checks.finite(usage=usage)
        return most_used(x, rate, namespace(x).broadcast_to(usage, (*lead, n)))
    wide = computing_dtype(x, *weights)
    quiet: Any = np.errstate(over="ignore", invalid="ignore") if framework(x) == "numpy" else nullcontext()
    with quiet:  # what overflows is about to be told
        made = compressed(cast(x, wide), rate, method, tuple(cast(w, wide) for w in weights))
        made = cast(made, x.dtype)
    checks.outcome(made, x=x, **_named(weights))
    return made


def compressed(x: Any, rate: int, method: str, weights: tuple[Any, ...]) -> Any:
    """`compress` by pooling or convolution, for x (..., n, d) and weights of one dtype that have been checked."""
    n, d = x.shape[-2:]
    blocks = namespace(x).reshape(x, (*x.shape[:-2], n // rate, rate, d))
    match method:
        case "mean":
            return namespace(x).mean(blocks, axis=-2)
        case "max":
            return namespace(x).max(blocks, axis=-2)
        case "conv":
            return convolved(blocks, *weights)
    return dilated(blocks, *weights)


def _named(weights: tuple[Any, ...]) -> dict[str, Any]:
    return {f"weights[{i}]": w for i, w in enumerate(weights)}


def checked_weights(method: str, rate: int, d: int, weights: Any) -> tuple[Any, ...]:
    """`weights` as a tuple, if they are those that the method takes.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError
    """
    if not isinstance(weights, list | tuple):
        raise ArgumentError("weights", "a tuple of arrays", type(weights).__name__, "Pass (kernel, bias).")
    weights = tuple(weights)
    for name, array in _named(weights).items():
        known_framework(name, array)
    if weights:
        checks.floating_arrays(**_named(weights))
    layers = layers_for(rate)
    shapes = {"conv": ((d, d, rate), (d,)), "dilated": ((layers, d, d, 2), (layers, d))}.get(method, ())
    came = tuple(tuple(w.shape) for w in weights)
    if came != shapes:
        raise ShapeError("weights", f"{shapes or 'none'} for {method}", str(came or "none"), "Pass kernel and bias.")
    return weights


def layers_for(rate: int) -> int:
    """Layers of dilated convolutions that see `rate` states."""
    return math.ceil(math.log2(rate)) if rate > 1 else 0


def convolved(blocks: Any, kernel: Any, bias: Any) -> Any:
    """A convolution whose kernel and stride are a block: (..., m, c, d) -> (..., m, d)."""
    xp = namespace(blocks)
    flat = xp.reshape(blocks, (*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1]))  # place-major: c, in
    matrix = xp.reshape(xp.permute_dims(kernel, (2, 1, 0)), (-1, kernel.shape[0]))  # (c in, out)
    return flat @ matrix + bias


def dilated(blocks: Any, kernel: Any, bias: Any) -> Any:
    """Convolutions of width 2 with dilations 1, 2, 4, ... inside each block; its last state has seen all of it."""
    xp, states = namespace(blocks), blocks
    layers, size = kernel.shape[0], blocks.shape[-2]
    for layer in range(layers):
        reach = min(2**layer, size)
        past = xp.concat([xp.zeros_like(states[..., :reach, :]), states[..., : size - reach, :]], axis=-2)
        W = kernel[layer, ...]
        states = past @ xp.matrix_transpose(W[:, :, 0]) + states @ xp.matrix_transpose(W[:, :, 1]) + bias[layer, :]
        if layer < layers - 1:
            states = xp.where(states > 0, states, xp.zeros_like(states))
    return states[..., -1, :]


def most_used(x: Any, rate: int, usage: Any) -> Any:
    """The n/c states of the largest usage, in their order; of equals the newer."""
    xp = namespace(x)
    n = x.shape[-2]
    newest_first = xp.flip(usage, axis=-1)
    order = n - 1 - xp.argsort(-newest_first, axis=-1, stable=True)[..., : n // rate]
    kept = cast(xp.sort(order, axis=-1), xp.int64)[..., None]
    return xp.take_along_axis(x, xp.broadcast_to(kept, (*kept.shape[:-1], x.shape[-1])), axis=-2)
