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
