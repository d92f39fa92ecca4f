"""Which rows a call is about, and what of an array belongs to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..backends.arrays import cast, common_framework, namespace
from ..backends.errors import ArgumentError, DTypeError
from ..backends.exchange import like, to_numpy
from ..core import checks


def listed(rows: Sequence[int] | None, total: int) -> list[int]:
    """`rows` as distinct ints below `total`; all of them for None.

    Raises
    ------
    ArgumentError
    """
    if rows is None:
        return list(range(total))
    if not isinstance(rows, Iterable):
        raise ArgumentError("rows", "a sequence of row numbers", repr(rows), f"Pass rows=[{rows!r}].")
    chosen = [checks.count("rows", row, least=0) for row in rows]
    if len(set(chosen)) < len(chosen) or any(row >= total for row in chosen):
        raise ArgumentError("rows", f"distinct rows below {total}", str(chosen), "Name each row once.")
    return chosen


def token_array(argument: str, given: Any, tokens: tuple[int, int], kind: str) -> np.ndarray:
    """`given` as NumPy, which must be (rows, n) of that kind of dtype.

    Raises
    ------
    ShapeError, DTypeError, FrameworkError
    """
    common_framework(**{argument: given})
    array = to_numpy(given)
    if not np.isdtype(array.dtype, kind):
        raise DTypeError(argument, f"a dtype of kind {kind}", str(array.dtype), f"Cast {argument} first.")
    checks.shape(argument, array, *tokens, whole=True)
    return array


def segment(x: Any, count: int, dim: int, mask: Any, dtype: str) -> tuple[Any, np.ndarray]:
    """x (count, n, dim) checked and in `dtype`, with which of its tokens are present, bool (count, n).

    Raises
    ------
    ShapeError, DTypeError, FrameworkError, NonFiniteError
        Also where a number, or a vector's squared norm, leaves the range of `dtype`.
    """
    checks.floating_arrays(x=x)
    checks.shape("x", x, count, "n", dim, whole=True)
    with np.errstate(over="ignore"):
        x = cast(x, getattr(namespace(x), dtype))
    checks.measurable(x=x)
    return x, present_tokens(mask, (count, int(x.shape[1])))


def present_tokens(mask: Any, tokens: tuple[int, int]) -> np.ndarray:
    """`mask` as bool (rows, n), all of it True for None.

    Raises
    ------
    ShapeError, DTypeError, FrameworkError
    """
    return np.ones(tokens, bool) if mask is None else token_array("mask", mask, tokens, "bool")


def detached(array: Any) -> Any:
    """`array` without the graph behind it, on the same memory."""
    return array.detach() if hasattr(array, "detach") else array


def taken(x: Any, group: Sequence[int], present: np.ndarray | None = None) -> Any:
    """Rows of x in `group`, without the tokens that are not `present`; x itself where that is all of it."""
    if not len(group):
        return x[:0, ...]
    whole = list(group) == list(range(x.shape[0]))
    if present is None or present[list(group)].all():
        return x if whole else namespace(x).stack([x[i, ...] for i in group])
    xp = namespace(x)
    return xp.stack([xp.take(x[i, ...], like(np.flatnonzero(present[i]), x), axis=0) for i in group])
