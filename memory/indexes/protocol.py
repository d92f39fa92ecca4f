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
    """Finds the nearest keys of one row. It holds nothing that the row's keys do not say: it is dropped with the row,
    never saved, and catches up by itself, whenever it is asked, with what was written since.
    """

    @property
    def nbytes(self) -> int:
        """Bytes it holds beside the row's keys."""
        ...

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions in the whole history, (heads, q, k), of the best keys for `queries` (heads, q, dim).

        Best first, ties to the newest; -inf and -1 where fewer than k are stored.
        """
        ...
