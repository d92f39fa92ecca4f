"""Exact top-k behind a first pass on tensor cores: what the `certify` kernels can take, and how they are started."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import name_of, namespace
from .launch import MOST_BLOCKS, empty, flat, launch, leading, mask_bytes, shared_or_flat, zeros

THREADS, WARPS, ROOM, MOST = 256, 8, 192, 64  # as in certify.cuh
DEPTHS = {64: 128, 128: 64}  # components, up to so many, and the queries that a block takes
FEWEST = 64  # keys, a tile; fewer are as soon scored in full
BLOCKS, SHORTEST = 512, 256  # blocks that fill a GPU, for which keys are searched in runs of at least so many
LONGEST = 2**31 - 1 - 64  # keys, whose numbers are 32-bit
STORED = {"float32": "float32", "bfloat16": "int16", "float16": "int16", "int8": "int8"}  # and the arrays' dtypes


def fits(queries: Any, keys: Any, k: int, mask: Any, dtype: str) -> bool:
    """Whether the kernels take keys (..., n, d), stored as `dtype`."""
    lead, n, d = leading_of(queries, keys, mask), keys.shape[-2], keys.shape[-1]
    known = name_of(queries.dtype) == "float32" and STORED.get(dtype) == name_of(keys.dtype)
    sizes = 0 < d <= max(DEPTHS) and FEWEST <= n <= LONGEST and k <= MOST
    return known and sizes and 0 not in (*lead, queries.shape[-2]) and math.prod(lead) <= MOST_BLOCKS


def leading_of(queries: Any, keys: Any, mask: Any) -> tuple[int, ...]:
    """The leading axes of all."""
    lead = leading(queries, keys)
    return lead if mask is None else np.broadcast_shapes(lead, tuple(mask.shape[:-2]))


def certified(queries: Any, keys: Any, scales: Any, k: int, mask: Any, start: int, dtype: str) -> Any:
    """Scores and positions (..., q, k) of the k best by inner product, of what `fits`; scales (..., n) or None."""
    (q, d), n, lead = queries.shape[-2:], keys.shape[-2], leading_of(queries, keys, mask)
    xp, batch = namespace(queries), math.prod(lead)
    depth = next(depth for depth in DEPTHS if d <= depth)
    queries, (keys, key_batch), scale_batch = flat(queries, lead), shared_or_flat(keys, lead), np.int64(0)
    if scales is not None:
        scales, scale_batch = shared_or_flat(scales[..., None], lead)
    mask, strides = mask_bytes(mask, lead)
    tiles = -(-q // DEPTHS[depth])
    runs = max(min(-(-BLOCKS // (tiles * batch)), n // SHORTEST), 1)
    parts = batch, q, runs
    found, counts = empty((*parts, ROOM), xp.int64, queries), empty(parts, xp.int32, queries)
    bands, sure = empty(parts, xp.float32, queries), zeros((batch, q), xp.int32, queries)
    launch(
        f"certify_{dtype}.cu",
        f"certify_{depth}_{dtype}",
        (tiles, runs, batch),
        THREADS,
        *(queries, keys, scales, mask, found, counts, bands, sure),
        *map(np.int32, (q, n, d, k, start, -(-n // runs))),
        *(key_batch, scale_batch, *strides),
    )
    scores, positions = (empty((batch, q, k), dtype, queries) for dtype in (xp.float32, xp.int64))
    launch(
        f"certify_{dtype}.cu",
        f"finish_{dtype}",
        (-(-batch * q // WARPS), 1, 1),
        THREADS,
        *(queries, keys, scales, found, counts, bands, sure, scores, positions),
        *(np.int64(batch * q), *map(np.int32, (q, n, d, k, start, runs)), key_batch, scale_batch),
    )
    return scores.reshape((*lead, q, k)), positions.reshape((*lead, q, k))
