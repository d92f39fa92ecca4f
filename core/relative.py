"""Attention that knows how far back each key is: sinusoids, relative scores, T5's buckets, rotary angles."""

from __future__ import annotations

import math
from typing import Any

from ..backends.arrays import cast, computing_dtype, namespace
from .attention import Reading, masked_softmax


def sinusoids(distances: Any, dim: int) -> Any:
    """[sin(d f), cos(d f)] at the frequencies f = 10000^(-2i/dim): (...,) -> (..., dim), the sines first.

    Source: Transformer-XL (arXiv 1901.02860), section 3.3, as its authors' code lays them out.
    """
    xp = namespace(distances)
    angles = distances[..., None] * frequencies(distances, dim, 10000.0)
    return xp.concat([xp.sin(angles), xp.cos(angles)], axis=-1)


def frequencies(like: Any, dim: int, base: float) -> Any:
    """base^(-2i/dim) for i < dim/2, beside `like`."""
    xp = namespace(like)
    steps = xp.arange(0, dim, 2, dtype=like.dtype, device=like.device)
    return xp.exp(steps * (-math.log(base) / dim))


def rotate(vectors: Any, positions: Any, base: float = 10000.0) -> Any:
    """Rotary positions: the pairs (i, i + d/2) of `vectors` (..., n, d) turned by positions (..., n) x frequency.

    Computed in at least float32. Only differences of positions matter, and small ones are the more accurate: count them
    from somewhere near.
    Source: RoFormer (arXiv 2104.09864), equation 34, in the half-split layout of Llama.
    """
    xp, narrow = namespace(vectors), vectors.dtype
    half, vectors = vectors.shape[-1] // 2, cast(vectors, computing_dtype(vectors))
    angles = cast(positions, vectors.dtype)[..., None] * frequencies(vectors, vectors.shape[-1], base)
    cos, sin = xp.cos(angles), xp.sin(angles)
    first, second = vectors[..., :half], vectors[..., half:]
    return cast(xp.concat([first * cos - second * sin, second * cos + first * sin], axis=-1), narrow)


def relative_scores(queries: Any, embeddings: Any, distances: Any) -> Any:
    """q_i · r_(distance of i and j) for every key j.

    Parameters
    ----------
    queries : array (rows, heads, q, d)
    embeddings : array (heads, D, d)
        r of the distances 0, 1, ... D-1.
    distances : int array (rows, q, n) or (1, q, n)
        Those outside 0 ... D-1 give some number, which the caller masks.

    Returns
    -------
    array (rows, heads, q, n)
    """
    xp = namespace(queries)
    every = queries @ xp.matrix_transpose(embeddings)  # (rows, heads, q, D)
    index = xp.clip(distances, 0, embeddings.shape[-2] - 1)[:, None]
    shape = (*every.shape[:-1], distances.shape[-1])
    return xp.take_along_axis(every, xp.broadcast_to(index, shape), axis=-1)


def shifted_scores(queries: Any, embeddings: Any) -> Any:
    """relative_scores of the last q of D successive tokens: (rows, heads, q, d), (heads, D, d) -> (rows, heads, q, D).

    Every row of scores by distance is shifted into place by one reshape, as in Transformer-XL (appendix B).
    """
    xp = namespace(queries)
    scores = queries @ xp.matrix_transpose(xp.flip(embeddings, axis=-2))  # the furthest first
    *lead, q, D = scores.shape
    padded = xp.concat([xp.zeros((*lead, q, 1), dtype=scores.dtype, device=scores.device), scores], axis=-1)
    return xp.reshape(xp.reshape(padded, (*lead, D + 1, q))[..., 1:, :], (*lead, q, D))


def buckets(distances: Any, count: int = 32, furthest: int = 128) -> Any:
    """T5's causal buckets of int distances: exact up to count/2, logarithmic up to `furthest`, one beyond.

    Source: T5 (arXiv 1910.10683), section 2.1, as its authors' code computes them.
    """
    xp = namespace(distances)
    exact = count // 2
    distances = xp.where(distances > 0, distances, xp.zeros_like(distances))
    ratio = cast(xp.where(distances < exact, exact, distances), xp.float32) / exact
    far = exact + cast(xp.log(ratio) * ((count - exact) / math.log(furthest / exact)), distances.dtype)
    far = xp.where(far < count, far, count - 1)
    return xp.where(distances < exact, distances, far)


def biased_attention(queries: Any, keys: Any, values: Any, bias: Any, scale: float, allowed: Any) -> Reading:
    """softmax(scale q·k + bias) v over the allowed keys, with its log-sum-exp, computed in at least float32.

    Parameters
    ----------
    queries, keys, values : arrays (..., q, d), (..., n, d), (..., n, dv)
    bias : array (..., q, n) or None
    scale : float
    allowed : bool array (..., q, n)

    Returns
    -------
    Reading
        output (..., q, dv) in the dtype of the queries, lse (..., q).
    """
    xp = namespace(queries)
    narrow, computing = queries.dtype, computing_dtype(queries, keys, values)
    queries, keys, values = (cast(a, computing) for a in (queries, keys, values))
    scores = scale * (queries @ xp.matrix_transpose(keys))  # (..., q, n)
    weights, lse = masked_softmax(scores if bias is None else scores + cast(bias, computing), allowed)
    return Reading(cast(weights @ values, narrow), lse)
