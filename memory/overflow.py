"""Tokens that a device has no more room for: on their way to main memory, or there."""

from __future__ import annotations

import copy
import threading
from typing import Any, Self

import numpy as np

from ..backends.parcels import Parcel, send
from .row import Row

Chunk = tuple[int, dict[str, Parcel]]  # tokens, and their arrays
MOST_WAITING = 8  # chunks on their way at once; then the first, which has long arrived, is put in its place


class Overflow:
    """A `Row` in main memory, and what is still to be written to it, in order.

    Nobody waits for a copy but who looks at the row.
    """

    def __init__(self, row: Row):
        self._row = row
        self._waiting: list[Chunk] = []
        self._arriving = threading.Lock()  # for readers, who come at once

    @property
    def written(self) -> int:
        """Tokens that have ever come, or are on their way."""
        return self._row.written + sum(tokens for tokens, _ in self._waiting)

    @property
    def stored(self) -> int:
        """Tokens held, those on their way included."""
        return min(self.written, self._row.capacity)

    @property
    def nbytes(self) -> int:
        return self._row.nbytes

    @property
    def row(self) -> Row:
        """The row with all that was sent to it; waits for what is on its way."""
        self._put_all_but(0)
        return self._row

    def reserve(self, tokens: int, tagged: bool) -> None:
        """Allocate for `tokens` more."""
        self._row.reserve(self.written - self._row.written + tokens, tagged)

    def packed(self, arrays: dict[str, Any]) -> Chunk:
        """Begin to copy arrays (heads, n, ...) from the device; nothing has changed yet."""
        return next(iter(arrays.values())).shape[1], {name: send(array) for name, array in arrays.items()}

    def push(self, chunks: list[Chunk]) -> None:
        """Take in chunks, which follow one another."""
        self._waiting += chunks
        self._put_all_but(MOST_WAITING)

    def _put_all_but(self, most: int) -> None:
        with self._arriving:
            while len(self._waiting) > most:
                self._put()

    def _put(self) -> None:
        _, parcels = self._waiting[0]
        arrays = {name: parcel.take() for name, parcel in parcels.items()}
        tags = arrays.pop("tags", None)
        raw = {name: a.view(np.uint16) if a.dtype == np.int16 else a for name, a in arrays.items()}
        self._row.write(raw, None if tags is None else tags[0])
        del self._waiting[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self.row, memo))
