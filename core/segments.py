"""Which of the tokens just past a query sees, counted in its row's own tokens, so that padding changes nothing.

A window holds the newest W tokens of every row, the newest last. The token at column j of a row that has read
`position` tokens is its token `position - W + j`; a negative number is no token. Documents are cut into segments of
`segment` tokens; token p sees the tokens of its own segment up to itself and the `reach` tokens before that segment,
however its document was cut into calls.
"""

from __future__ import annotations

from typing import Any

from ..backends.arrays import cast, namespace


def numbers(position: Any, held: int, n: int, present: Any = None) -> Any:
    """Which token of its row each column is, (rows, held + n): `held` of the window, then n new; negative is none."""
    xp = namespace(position)
    columns = xp.arange(-held, n, dtype=position.dtype, device=position.device)
    if present is None:
        return position[:, None] + columns
    new = xp.where(present, xp.cumulative_sum(cast(present, position.dtype), axis=-1) - 1 + position[:, None], -1)
    return xp.concat([position[:, None] + columns[:held], new], axis=-1)


def visible(tokens: Any, n: int, segment: int, reach: int) -> Any:
    """Which columns each of the n newest sees, bool (rows, n, columns), given the number of each column's token.

    A column that is no token sees itself, so that no softmax is empty; what it computes is discarded.
    """
    xp = namespace(tokens)
    held = tokens.shape[1] - n
    query, key = tokens[:, held:, None], tokens[:, None, :]
    oldest = query // segment * segment - reach
    columns = xp.arange(held + n, device=tokens.device)
    itself = columns[held:, None] == columns
    return ((key >= 0) & (key <= query) & (key >= oldest)) | itself


def slide(held: Any, new: Any, present: Any = None) -> Any:
    """The newest W of the tokens `held` (rows, ..., W, d) followed by the present ones of `new` (rows, ..., n, d)."""
    xp = namespace(held)
    size = held.shape[-2]
    both = xp.concat([held, cast(new, held.dtype)], axis=-2)
    if present is None:
        return both[..., both.shape[-2] - size :, :]
    real = xp.concat([xp.ones((held.shape[0], size), dtype=xp.bool, device=held.device), present], axis=-1)
    order = xp.argsort(cast(real, xp.int8), axis=-1, stable=True)[:, -size:]  # absent tokens first, the others in order
    index = xp.reshape(order, (held.shape[0], *(1,) * (held.ndim - 3), size, 1))
    return xp.take_along_axis(both, xp.broadcast_to(index, held.shape), axis=-2)
