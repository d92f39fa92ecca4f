"""Search over keys as a memory stores them, narrower than what is computed with."""

from __future__ import annotations

import functools
from typing import Any

from ..backends import kernel
from ..backends.arrays import cast, namespace
from .retrieval import better, retrieve

CHUNK = 1 << 16  # keys that are widened at once


@kernel
def retrieve_stored(
    queries: Any, stored: Any, scales: Any, dtype: str, k: int, space: str, start: int
) -> tuple[Any, Any]:
    """`retrieve` for the keys that `stored` (..., n, d), of `dtype`, stand for; a part of them is widened at a time."""
    n, found = stored.shape[-2], []
    if n == 0:
        return retrieve(queries, decode(stored, scales, dtype), k, space, None, 0)
    for first, last, shift in ((0, start, n - start), (start, n, -start)):
        for end in range(last, first, -CHUNK):  # slots begin <= s < end, at positions s + shift
            begin = max(end - CHUNK, first)
            some = None if scales is None else scales[..., begin:end]
            keys = decode(stored[..., begin:end, :], some, dtype)
            scores, ages = retrieve(queries, keys, k, space, None, 0)
            found.append((scores, namespace(ages).where(ages >= 0, ages + (begin + shift), -1)))
    return functools.reduce(lambda newer, older: better(newer, older, k), found)


def decode(stored: Any, scales: Any, dtype: str) -> Any:
    """The numbers that vectors stored as `dtype` stand for; float16 and bfloat16 are given by their bits, as int16."""
    xp = namespace(stored)
    match dtype:
        case "bfloat16":
            return (cast(stored, xp.int32) << 16).view(xp.float32)
        case "float16":
            return cast(stored.view(xp.float16), xp.float32)
        case "int8":
            return cast(stored, xp.float32) * scales[..., None]
    return stored
