"""Exact k nearest neighbours by inner product, cosine or Euclidean distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..backends import kernel
from ..backends.arrays import cast, common_framework, namespace
from . import checks

SPACES = ("ip", "cosine", "l2")


@dataclass(frozen=True)
class Neighbours:
    """The k retrieved entries of every query, best first; ties go to the newest.

    Attributes
    ----------
    scores : array (..., q, k)
        `q·k` ("ip"), the cosine of the angle ("cosine") or `-|q-k|²` ("l2"); -inf where fewer than k exist.
    positions : int64 array (..., q, k)
        Which token each is; -1 where fewer than k exist.
    keys, values : arrays (..., q, k, d) and (..., q, k, dv), or None
        The entries themselves, when a memory retrieved them; zeros where fewer than k exist.
    tags : int64 array (..., q, k) or None
        The tag each entry was written with, when a memory keeps tags; -1 where fewer than k exist.
    """

    scores: Any
    positions: Any
    keys: Any = None
    values: Any = None
    tags: Any = None


def top_k(queries: Any, keys: Any, k: int, space: str = "ip", mask: Any = None) -> Neighbours:
    """The exact k best keys of every query.

    Parameters
    ----------
    queries : array (..., q, d)
    keys : array (..., n, d)
        In order of age, the newest last.
    k : int
        At least 1; may exceed n, up to 65,536.
    space : {"ip", "cosine", "l2"}
        Scores are `q·k`, `q·k/(|q||k|)` (0 for a zero vector), or `-|q-k|²`.
    mask : bool array, broadcastable to (..., q, n); optional
        True where a key may be retrieved. A key that no query may see may hold anything, NaN included.

    Returns
    -------
    Neighbours
        scores and positions (..., q, k), best first, ties to the newest; -inf and -1 where fewer than k exist. Scores
        have the dtype of `queries`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError

    Notes
    -----
    Cost O(q n d) time. Memory O(q n) by the formula, O(q k) with the Numba twin. Gradients reach the scores.
    Source: Memorizing Transformers (arXiv 2203.08913), section 3.2, with exact search in place of approximate.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> near = perdure.top_k(np.array([[1.0, 0.0]]), np.array([[0.9, 0.1], [0.0, 1.0], [1.0, 0.0]]), k=2)
    >>> near.positions
    array([[2, 0]])
    """
    checks.choice("space", space, SPACES)
    checks.floating_arrays(queries=queries, keys=keys)
    checks.shape("queries", queries, "q", "d")
    checks.shape("keys", keys, "n", queries.shape[-1])
    lead = checks.leading(queries=(queries, 2), keys=(keys, 2))
    checks.mask(mask, lead, queries.shape[-2], keys.shape[-2])
    common_framework(queries=queries, mask=mask)
    if mask is not None:
        keys = blanked(keys, seen_by_any(mask, queries.shape[-2], keys.shape[-2]))
    checks.measurable(queries=queries, keys=keys)
    k = checks.neighbours(k, keys.shape[-2])
    return Neighbours(*retrieve(queries, keys, k, space, mask, 0))


@kernel
def retrieve(queries: Any, keys: Any, k: int, space: str, mask: Any, start: int) -> tuple[Any, Any]:
    """Scores and positions of the k best keys; `start` is the slot of the oldest, and positions count from it."""
    xp = namespace(queries)
    if start:
        keys = xp.roll(keys, -start, axis=-2)
    scores = similarity(queries, keys, space)  # (..., q, n)
    nothing = xp.asarray(-math.inf, dtype=scores.dtype, device=scores.device)
    if mask is not None:
        scores = xp.where(mask, scores, nothing)
    n, missing = keys.shape[-2], max(k - keys.shape[-2], 0)
    newest_first = xp.flip(scores, axis=-1)
    order = xp.argsort(-newest_first, axis=-1, stable=True)[
        ..., : min(k, n)
    ]  # stable: the newest of equals comes first
    best = xp.take_along_axis(newest_first, order, axis=-1)
    positions = xp.where(best > -math.inf, n - 1 - order, -1)
    if missing:
        shape = (*best.shape[:-1], missing)
        best = xp.concat([best, xp.broadcast_to(nothing, shape)], axis=-1)
        positions = xp.concat([positions, xp.full(shape, -1, dtype=positions.dtype, device=best.device)], axis=-1)
    return best, cast(positions, xp.int64)


def better(newer: tuple[Any, Any], older: tuple[Any, Any], k: int) -> tuple[Any, Any]:
    """The k best, best first, of two (scores, positions) (..., q, m) that are so each; of equals those of `newer`."""
    xp = namespace(newer[0])
    scores, positions = (xp.concat(pair, axis=-1) for pair in zip(newer, older, strict=True))
    order = xp.argsort(-scores, axis=-1, stable=True)[..., :k]
    return xp.take_along_axis(scores, order, axis=-1), xp.take_along_axis(positions, order, axis=-1)


def seen_by_any(mask: Any, q: int, n: int) -> Any:
    """Which keys any of the q queries may see: a mask that broadcasts to (..., q, n) -> (..., n, 1)."""
    xp = namespace(mask)
    return xp.any(xp.broadcast_to(mask, (*mask.shape[:-2], q, n)), axis=-2)[..., None]


def blanked(vectors: Any, allowed: Any) -> Any:
    """`vectors` with zeros where not `allowed`."""
    xp = namespace(vectors)
    return xp.where(allowed, vectors, xp.asarray(0, dtype=vectors.dtype, device=vectors.device))


def bucketed(queries: Any, keys: Any, k: int, space: str) -> tuple[Any, Any]:
    """The best of each of k buckets of keys, key s in bucket s mod k: scores and slots (..., q, k), best first.

    Of equal scores in a bucket the lowest slot wins; an empty bucket gives -inf and -1. Source: the code released with
    Memorizing Transformers, which takes this for the k best; with as many buckets as neighbours it finds about .64 of
    them.
    """
    xp = namespace(queries)
    scores = similarity(queries, keys, space)  # (..., q, n)
    rounds = -(-keys.shape[-2] // k)
    blank = xp.full((*scores.shape[:-1], rounds * k - keys.shape[-2]), -math.inf, dtype=scores.dtype)
    buckets = xp.reshape(xp.concat([scores, blank], axis=-1), (*scores.shape[:-1], rounds, k))
    first = xp.argmax(buckets, axis=-2)  # (..., q, k)
    best = xp.max(buckets, axis=-2)
    slots = xp.where(best > -math.inf, first * k + xp.arange(k), -1)
    order = xp.argsort(-best, axis=-1, stable=True)
    return xp.take_along_axis(best, order, axis=-1), cast(xp.take_along_axis(slots, order, axis=-1), xp.int64)


def similarity(queries: Any, keys: Any, space: str) -> Any:
    """Scores of every pair, (..., q, d) x (..., n, d) -> (..., q, n), the larger the nearer."""
    xp = namespace(queries)
    if space == "cosine":
        return unit(queries) @ xp.matrix_transpose(unit(keys))
    if space == "ip":
        return queries @ xp.matrix_transpose(keys)
    # |q-k|² = |q|² - 2 q·k + |k|² cancels: float64, from a key in the middle of all, keeps what float32 inputs can tell
    # apart; and what is whole in the inputs stays whole, so that ties do
    computing = queries.dtype
    queries, keys = cast(queries, xp.float64), cast(keys, xp.float64)
    if keys.shape[-2]:
        away = keys - xp.mean(keys, axis=-2, keepdims=True)
        middle = xp.argmin(xp.sum(away * away, axis=-1, keepdims=True), axis=-2, keepdims=True)
        centre = xp.take_along_axis(keys, xp.broadcast_to(middle, (*keys.shape[:-2], 1, keys.shape[-1])), axis=-2)
        queries, keys = queries - centre, keys - centre
    squares = xp.sum(queries * queries, axis=-1)[..., :, None] + xp.sum(keys * keys, axis=-1)[..., None, :]
    distances = squares - 2 * (queries @ xp.matrix_transpose(keys))
    return cast(-xp.where(distances > 0, distances, xp.zeros_like(distances)), computing)


@kernel
def unit(vectors: Any) -> Any:
    """`vectors` at norm 1 along the last axis; zero vectors stay zero, with zero gradient.

    Scaled by the largest component first, so that neither tiny nor huge norms lose their direction.
    """
    xp = namespace(vectors)
    if vectors.shape[-1] == 0:
        return vectors
    largest = xp.max(xp.abs(vectors), axis=-1, keepdims=True)
    one = xp.ones_like(largest)
    scaled = vectors / xp.where(largest > 0, largest, one)
    square = xp.sum(scaled * scaled, axis=-1, keepdims=True)
    return scaled / xp.sqrt(xp.where(square > 0, square, one))
