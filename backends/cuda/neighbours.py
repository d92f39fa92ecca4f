"""Attention over neighbours: what `attend.cu` can take, and how it is started, forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import cast, name_of, namespace
from .launch import contiguous, empty, flat, launch, leading, shared_or_flat

WARPS, THREADS, MOST = 4, 128, 256  # as in attend.cu
LONGEST = 2**31 - 1  # keys, whose slots are 32-bit


@dataclass(frozen=True)
class Call:
    """A call as the kernels take it: leading axes as one, keys and values shared where they were."""

    lead: tuple[int, ...]
    queries: Any  # (batch, q, d)
    keys: Any  # (batch or 1, n, d)
    values: Any  # (batch or 1, n, dv)
    positions: Any  # (batch, q, k), -1 where masked
    sizes: tuple[Any, ...]

    @property
    def name(self) -> str:
        return name_of(self.queries.dtype)

    @property
    def grid(self) -> tuple[int, int, int]:
        return -(-self.queries.shape[0] * self.queries.shape[1] // WARPS), 1, 1

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.queries, self.keys, self.values, self.positions


def fits(queries: Any, keys: Any, values: Any, positions: Any, mask: Any) -> bool:
    """Whether the kernels take the call."""
    if positions is None or positions.shape[-1] > MOST or keys.shape[-2] > LONGEST:
        return False
    arrays = queries, keys, values, positions, *(() if mask is None else (mask,))
    lead = leading(*(a for a in arrays if a.ndim > 1))
    return 0 not in (*lead, *queries.shape[-2:], keys.shape[-2], values.shape[-1], positions.shape[-1])


def found(positions: Any, mask: Any) -> Any:
    """Positions as int64, -1 where the mask forbids to look."""
    xp = namespace(positions)
    positions = cast(positions, xp.int64)
    return positions if mask is None else xp.where(mask, positions, -1)


def taken(queries: Any, keys: Any, values: Any, positions: Any, scale: float, start: int) -> Call:
    """The call as the kernels take it."""
    lead = leading(queries, keys, values, positions)
    (q, d), (n, dv), k = queries.shape[-2:], values.shape[-2:], positions.shape[-1]
    (keys, key_batch), (values, value_batch) = shared_or_flat(keys, lead), shared_or_flat(values, lead)
    counts = np.int64(math.prod(lead) * q), *map(np.int32, (q, n, d, dv, k, start))
    real = np.dtype(name_of(queries.dtype)).type
    sizes = *counts, key_batch, value_batch, real(scale)
    return Call(lead, flat(queries, lead), keys, values, flat(positions, lead), sizes)


def attention(queries: Any, keys: Any, values: Any, positions: Any, scale: float, mask: Any, start: int) -> Any:
    if not fits(queries, keys, values, positions, mask):
        return NotImplemented
    return attention_forward(queries, keys, values, found(positions, mask), scale, start)


def attention_forward(queries: Any, keys: Any, values: Any, positions: Any, scale: float, start: int) -> Any:
    call = taken(queries, keys, values, positions, scale, start)
    (batch, q), dv = call.queries.shape[:2], values.shape[-1]
    output, lse = (empty(shape, queries.dtype, queries) for shape in ((batch, q, dv), (batch, q)))
    launch("attend.cu", f"attend_{call.name}", call.grid, THREADS, *call.inputs, output, lse, *call.sizes)
    return output.reshape((*call.lead, q, dv)), lse.reshape((*call.lead, q))


def attention_backward(
    queries: Any,
    keys: Any,
    values: Any,
    positions: Any,
    scale: float,
    start: int,
    output: Any,
    output_gradient: Any,
    lse_gradient: Any,
    of_pairs: bool,
) -> tuple[Any, Any, Any]:
    """Gradients of queries, keys and values (None, None unless `of_pairs`), of a call that `attention` took.

    All leading axes are `lead` already: broadcasting, and its gradient, is the caller's.
    """
    if of_pairs:  # their gradients are laid out as they are
        keys, values = contiguous(keys), contiguous(values)
    call = taken(queries, keys, values, positions, scale, start)
    xp, lead, q = namespace(queries), call.lead, queries.shape[-2]
    given = (flat(output, lead), flat(output_gradient, lead), contiguous(lse_gradient).reshape((-1,)))
    of_queries = empty(tuple(call.queries.shape), queries.dtype, queries)
    of_keys: Any
    of_values: Any
    of_keys, of_values = (
        xp.zeros(tuple(a.shape), dtype=a.dtype, device=a.device) if of_pairs else None for a in (call.keys, call.values)
    )
    launch(
        "attend.cu",
        f"attend_backward_{call.name}",
        call.grid,
        THREADS,
        *call.inputs,
        *given,
        *(of_queries, of_keys, of_values),
        *call.sizes,
    )
    of_queries = of_queries.reshape((*lead, q, queries.shape[-1]))
    if of_pairs:
        of_keys, of_values = of_keys.reshape(tuple(keys.shape)), of_values.reshape(tuple(values.shape))
    return of_queries, of_keys, of_values
