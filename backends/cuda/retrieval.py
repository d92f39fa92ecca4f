"""Exact top-k, and vectors of norm 1: what `retrieve.cu` and `unit.cu` can take, and how they are started.

Inner products of vectors that fit go through `certified` instead, with the same result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import name_of, namespace
from . import certified
from .certified import leading_of
from .launch import MOST_BLOCKS, contiguous, empty, flat, launch, mask_bytes, shared_or_flat

QUERIES, THREADS, MOST = 32, 128, 64  # as in retrieve.cu
WARPS = 4  # a block of unit.cu and of merge_runs
BLOCKS, SHORTEST = 1024, 256  # blocks that fill a GPU, for which keys are searched in runs of at least so many
LONGEST = 2**31 - 1 - 64  # keys, whose numbers are 32-bit


def retrieve(queries: Any, keys: Any, k: int, space: str, mask: Any, start: int) -> Any:
    if not retrieve_fits(queries, keys, k, mask):
        return NotImplemented
    (q, d), n = queries.shape[-2:], keys.shape[-2]
    lead = leading_of(queries, keys, mask)
    batch = math.prod(lead)
    if space == "cosine":
        queries, keys = unit(queries), unit(keys)
    if space != "l2" and certified.fits(queries, keys, k, mask, "float32"):
        return certified.certified(queries, keys, None, k, mask, start, "float32")
    xp = namespace(queries)
    queries, (keys, key_batch) = flat(queries, lead), shared_or_flat(keys, lead)
    mask, strides = mask_bytes(mask, lead)
    tiles = -(-q // QUERIES)
    runs = max(min(-(-BLOCKS // (tiles * batch)), n // SHORTEST), 1)
    length = -(-n // runs)
    found = empty((batch, q, runs, k), xp.int64, queries)
    launch(
        "retrieve.cu",
        "retrieve_distances" if space == "l2" else "retrieve_products",
        (tiles, runs, batch),
        THREADS,
        *(queries, keys, mask, found),
        *map(np.int32, (q, n, d, k, start, length)),
        key_batch,
        *strides,
    )
    scores, positions = (empty((batch, q, k), dtype, queries) for dtype in (xp.float32, xp.int64))
    blocks = -(-batch * q // WARPS)
    sizes = np.int64(batch * q), np.int32(runs), np.int32(k)
    launch("retrieve.cu", "merge_runs", (blocks, 1, 1), THREADS, found, scores, positions, *sizes)
    return scores.reshape((*lead, q, k)), positions.reshape((*lead, q, k))


def retrieve_fits(queries: Any, keys: Any, k: int, mask: Any) -> bool:
    lead, n = leading_of(queries, keys, mask), keys.shape[-2]
    plain = name_of(queries.dtype) == name_of(keys.dtype) == "float32" and 0 not in (*lead, *queries.shape[-2:], n)
    return plain and k <= MOST and n <= LONGEST and math.prod(lead) <= MOST_BLOCKS


def retrieve_stored(queries: Any, stored: Any, scales: Any, dtype: str, k: int, space: str, start: int) -> Any:
    if space != "ip" or not certified.fits(queries, stored, k, None, dtype):
        return NotImplemented
    return certified.certified(queries, stored, scales, k, None, start, dtype)


def unit(vectors: Any) -> Any:
    if 0 in vectors.shape:
        return NotImplemented
    vectors = contiguous(vectors)
    out, d = empty(tuple(vectors.shape), vectors.dtype, vectors), vectors.shape[-1]
    count = math.prod(vectors.shape[:-1])
    blocks = -(-count // WARPS)
    kernel = f"unit_{name_of(vectors.dtype)}"
    launch("unit.cu", kernel, (blocks, 1, 1), THREADS, vectors, out, np.int64(count), np.int32(d))
    return out
