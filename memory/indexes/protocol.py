"""What every index can do."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Ring(Protocol):
    """What an index sees of its row: its keys, the token at position p in slot p % capacity."""

    capacity: int
    written: int

    @property
    def stored(self) -> int: ...
    @property
    def oldest(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def slots(self) -> int: ...
    def part(self, name: str, where: Any) -> tuple[np.ndarray, np.ndarray | None]: ...
    def numbers(self, name: str, where: Any) -> np.ndarray: ...


def turnovers(row: Ring) -> float:
    """How many times as much as it holds a row was given."""
    return row.written / max(row.stored, 1)


class Held:
    """Keys (heads, n, d) as an index sees those of a row."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys
        self.capacity = self.written = self.stored = self.slots = keys.shape[1]
        self.oldest = self.start = 0

    def part(self, name: str, where: Any) -> tuple[np.ndarray, None]:
        return self.keys[where], None

    def numbers(self, name: str, where: Any) -> np.ndarray:
        return self.keys[where]


class Index(Protocol):
    """Finds the nearest keys of one row. It is dropped with the row, and catches up by itself, whenever it is asked,
    with what was written since. What it is made of is not saved but made again; only what it learned is its state.
    """

    @property
    def nbytes(self) -> int:
        """Bytes it holds beside the row's keys."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """What it needs, beside the row's keys, to go on as if it had never been saved."""
        ...

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from `state`.

        Raises
        ------
        ArgumentError
            A state that no index of this kind and size can have.
        """
        ...

    def explain(self) -> str:
        """How it searches now, and why."""
        ...

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions in the whole history, (heads, q, k), of the best keys for `queries` (heads, q, dim).

        Best first, ties to the newest; -inf and -1 where fewer than k are stored.
        """
        ...
