"""The newest states of every row, right-aligned in one array: what recurrent and compressive memories are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.arrays import framework, namespace
from ..backends.exchange import like, to_numpy
from .rows import detached, taken


@dataclass(frozen=True)
class States:
    """What a row remembers, oldest first, so that queries can attend to it beside the present segment.

    Attributes
    ----------
    states : array (rows, m, dim)
        m is the most that any of the rows holds; shorter rows have zeros on the left.
    mask : bool array (rows, m)
        False where a row holds nothing.
    """

    states: Any
    mask: Any


@dataclass(frozen=True)
class Change:
    """What an append makes of a window, before it is done.

    Attributes
    ----------
    states, usage, stored : arrays
        The window's own afterwards.
    gone : array (listed, E, dim)
        The states that leave, left-aligned.
    gone_usage : float64 array (listed, E)
    leaving : int64 array (listed,)
        How many leave in each row.
    """

    states: Any
    usage: np.ndarray
    stored: np.ndarray
    gone: Any
    gone_usage: np.ndarray
    leaving: np.ndarray


class Window:
    """At most `width` states a row. They live in the framework and on the device of what was last appended."""

    def __init__(self, rows: int, width: int, dim: int, dtype: str):
        self.rows, self.width, self.dtype = rows, width, dtype
        self.states: Any = np.zeros((rows, width, dim), dtype)
        self.usage = np.zeros((rows, width))  # attention each state drew since it came
        self.stored = np.zeros(rows, np.int64)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.states.shape)) * np.dtype(self.dtype).itemsize + self.usage.nbytes

    def beside(self, x: Any) -> Any:
        """All states in the framework and on the device of x."""
        if framework(self.states) == framework(x) and self.states.device == x.device:
            return self.states
        return like(to_numpy(self.states), x, getattr(namespace(x), self.dtype))

    def prepare(self, x: Any, present: np.ndarray, listed: list[int], keep: int, rate: int) -> Change:
        """All of an append but the doing: x (listed, n, dim) where `present` (listed, n), `listed` not empty.

        Of what exceeds `keep`, blocks of `rate` leave.
        """
        xp, old = namespace(x), detached(self.beside(x))
        joined = xp.concat([xp.stack([old[r, ...] for r in listed]), detached(x)], axis=1)
        usage = np.concatenate([self.usage[listed], np.zeros(present.shape)], axis=1)
        held = np.arange(self.width) >= self.width - self.stored[listed, None]
        valid = np.concatenate([held, present], axis=1)  # (listed, width + n)
        total = valid.sum(axis=1)
        leaving = np.maximum(total - keep, 0) // rate * rate
        order = np.argsort(~valid, axis=1, kind="stable")  # valid columns first, in their order
        columns = np.arange(max(int(leaving.max(initial=0)), 0))
        gone = order[:, : columns.size]
        stays = total - leaving
        slots = np.arange(self.width) - (self.width - stays[:, None])  # place among those that stay; negative: none
        kept = np.take_along_axis(order, np.where(slots >= 0, leaving[:, None] + slots, 0), axis=1)
        new = _picked(joined, kept, slots >= 0)
        whole = listed == list(range(self.rows))
        if not whole:
            new = xp.stack([new[listed.index(r), ...] if r in listed else old[r, ...] for r in range(self.rows)])
        all_usage, stored = self.usage.copy(), self.stored.copy()
        all_usage[listed] = np.where(slots >= 0, np.take_along_axis(usage, kept, axis=1), 0)
        stored[listed] = stays
        left = columns < leaving[:, None]
        gone_usage = np.where(left, np.take_along_axis(usage, gone, axis=1), 0)
        return Change(new, all_usage, stored, _picked(joined, gone, left), gone_usage, leaving)

    def accept(self, change: Change) -> None:
        """The append that was prepared."""
        self.states, self.usage, self.stored = change.states, change.usage, change.stored

    def read(self, x: Any, listed: list[int]) -> States:
        """The states of the rows `listed`, beside x."""
        m = int(self.stored[listed].max(initial=0))
        held = taken(self.beside(x), listed)[:, self.width - m :, ...]
        mask = np.arange(m) >= m - self.stored[listed, None]
        return States(held, like(mask, x))

    def clear(self, listed: list[int]) -> None:
        """Forget the rows `listed`."""
        gone = np.zeros((self.rows, 1, 1), bool)
        gone[listed] = True
        xp = namespace(self.states)
        self.states = xp.where(like(gone, self.states), xp.zeros_like(self.states), self.states)
        self.usage[listed], self.stored[listed] = 0, 0


def _picked(joined: Any, columns: np.ndarray, wanted: np.ndarray) -> Any:
    """joined[row, columns[row]] (rows, m, dim), zero where not wanted (rows, m)."""
    xp = namespace(joined)
    index = np.broadcast_to(columns[..., None], (*columns.shape, joined.shape[-1]))
    taken = xp.take_along_axis(joined, like(np.ascontiguousarray(index, np.int64), joined), axis=1)
    return xp.where(like(np.ascontiguousarray(wanted[..., None]), joined), taken, xp.zeros_like(taken))
