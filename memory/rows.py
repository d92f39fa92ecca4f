"""Which rows a call is about, and what of an array belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backends.arrays import namespace
from ..backends.errors import ArgumentError
from ..backends.exchange import like
from ..core import checks


def chosen(rows: Sequence[int] | None, total: int) -> list[int]:
    """`rows` as distinct ints below `total`; all of them for None.

    Raises
    ------
    ArgumentError
    """
    if rows is None:
        return list(range(total))
    listed = [checks.count("rows", row, least=0) for row in rows]
    if len(set(listed)) < len(listed) or any(row >= total for row in listed):
        raise ArgumentError("rows", f"distinct rows below {total}", str(listed), "Name each row once.")
    return listed


def detached(array: Any) -> Any:
    """`array` without the graph behind it, on the same memory."""
    return array.detach() if hasattr(array, "detach") else array


def taken(x: Any, group: Sequence[int], present: np.ndarray | None = None) -> Any:
    """Rows of x in `group`, without the tokens that are not `present`; x itself where that is all of it."""
    whole = list(group) == list(range(x.shape[0]))
    if present is None or present[list(group)].all():
        return x if whole else namespace(x).stack([x[i, ...] for i in group])
    xp = namespace(x)
    return xp.stack([xp.take(x[i, ...], like(np.flatnonzero(present[i]), x), axis=0) for i in group])
