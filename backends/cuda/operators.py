"""The CUDA kernels as PyTorch operators: on the current stream, traced by torch.compile, captured by CUDA graphs.

An operator takes what the `..._fits` function beside its kernel admits. Attention has a gradient, through a kernel of
its own; the others are for tensors that need none.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import certified, density, neighbours, retrieval
from .launch import leading


@torch.library.custom_op("perdure::retrieve", mutates_args=())
def retrieve(
    queries: torch.Tensor, keys: torch.Tensor, k: int, space: str, mask: torch.Tensor | None, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return retrieval.retrieve(queries, keys, k, space, mask, start)


@retrieve.register_fake
def _(queries, keys, k, space, mask, start):
    shape = (*torch.broadcast_shapes(queries.shape[:-2], keys.shape[:-2]), queries.shape[-2], k)
    if mask is not None:
        shape = (*torch.broadcast_shapes(shape[:-2], mask.shape[:-2]), *shape[-2:])
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("perdure::retrieve_stored", mutates_args=())
def retrieve_stored(
    queries: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor | None, dtype: str, k: int, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return certified.certified(queries, stored, scales, k, None, start, dtype)


@retrieve_stored.register_fake
def _(queries, stored, scales, dtype, k, start):
    shape = (*torch.broadcast_shapes(queries.shape[:-2], stored.shape[:-2]), queries.shape[-2], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("perdure::expected", mutates_args=())
def expected(
    B: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    centers: torch.Tensor,
    widths: torch.Tensor,
    density_name: str,
) -> torch.Tensor:
    return density.expected(B, mean, variance, centers, widths, density_name)


@expected.register_fake
def _(B, mean, variance, centers, widths, density_name):
    *lead, q = torch.broadcast_shapes(mean.shape, variance.shape)
    return B.new_empty((*torch.broadcast_shapes(B.shape[:-2], lead), q, B.shape[-1]))


@torch.library.custom_op("perdure::histogram", mutates_args=())
def histogram(mean: torch.Tensor, variance: torch.Tensor, edges: torch.Tensor, density_name: str) -> torch.Tensor:
    return density.histogram(mean, variance, edges, density_name)


@histogram.register_fake
def _(mean, variance, edges, density_name):
    lead = torch.broadcast_shapes(mean.shape, variance.shape)[:-1]
    return mean.new_empty((*lead, edges.shape[-1] - 1))


@torch.library.custom_op("perdure::systematic", mutates_args=())
def systematic(histogram: torch.Tensor, samples: int, shift: torch.Tensor) -> torch.Tensor:
    return density.systematic(histogram, samples, shift)


@systematic.register_fake
def _(histogram, samples, shift):
    return histogram.new_empty((*histogram.shape[:-1], samples))


@torch.library.custom_op("perdure::attend", mutates_args=())
def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return neighbours.attention_forward(queries, keys, values, positions, scale, start)


@attend.register_fake
def _(queries, keys, values, positions, scale, start):
    lead = positions.shape[:-1]
    return queries.new_empty((*lead, values.shape[-1])), queries.new_empty(lead)


@torch.library.custom_op("perdure::attend_backward", mutates_args=())
def attend_backward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    start: int,
    output: torch.Tensor,
    output_gradient: torch.Tensor,
    lse_gradient: torch.Tensor,
    of_pairs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_queries, of_keys, of_values = neighbours.attention_backward(
        *(queries, keys, values, positions, scale, start, output, output_gradient, lse_gradient, of_pairs)
    )
    if of_keys is None:
        of_keys, of_values = keys.new_empty(0), values.new_empty(0)
    return of_queries, of_keys, of_values


@attend_backward.register_fake
def _(queries, keys, values, positions, scale, start, output, output_gradient, lse_gradient, of_pairs):
    pairs = (keys.new_empty(keys.shape if of_pairs else 0), values.new_empty(values.shape if of_pairs else 0))
    return queries.new_empty(queries.shape), *pairs


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, ctx.scale, ctx.start = inputs
    ctx.save_for_backward(*tensors, output[0])


def _differentiate(ctx: Any, output_gradient: Any, lse_gradient: Any) -> tuple[Any, ...]:
    *tensors, output = ctx.saved_tensors
    of_pairs = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    of_queries, of_keys, of_values = attend_backward(
        *tensors, ctx.scale, ctx.start, output, output_gradient, lse_gradient, of_pairs
    )
    return of_queries, *((of_keys, of_values) if of_pairs else (None, None)), None, None, None


attend.register_autograd(_differentiate, setup_context=_remember)


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` of tensors whose leading axes differ: expanded to common ones, but for keys that all share."""
    positions = neighbours.found(positions, mask)
    lead = leading(queries, keys, values, positions)
    queries, positions = (a.expand(*lead, *a.shape[-2:]) for a in (queries, positions))
    positions = positions.expand(*lead, queries.shape[-2], positions.shape[-1])
    keys, values = (a if math.prod(a.shape[:-2]) == 1 else a.expand(*lead, *a.shape[-2:]) for a in (keys, values))
    return attend(queries, keys, values, positions, scale, start)
