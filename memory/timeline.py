"""Which token of a row's history each place of its signal shows, through every contraction and sticky sample."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from ..backends.parcels import Parcel

KNOTS = 513  # places at which the monotone map from [0, 1] to tokens is held, linear between
MOST_WAITING = 64  # contractions whose positions are on their way; then the first, which have arrived, are done


@dataclass(frozen=True)
class Kept:
    """Which positions of the old signal a write kept: row `row` of `where` (rows, M), which may be on its way."""

    where: np.ndarray | Parcel
    row: int

    def take(self) -> np.ndarray:
        return (self.where.take() if isinstance(self.where, Parcel) else self.where)[self.row]


class Timeline:
    """A monotone map a row: `tokens[row, i]` of the row's history lie before the place i/(KNOTS - 1)."""

    def __init__(self, rows: int):
        self.places = np.linspace(0, 1, KNOTS)
        self._tokens = np.zeros((rows, KNOTS))
        self._waiting: list[tuple[int, float, Kept, int]] = []
        self._arriving = threading.Lock()

    @property
    def tokens(self) -> np.ndarray:
        """Tokens before each place, float64 (rows, KNOTS); waits for what is on its way."""
        self._do_all_but(0)
        return self._tokens

    @tokens.setter
    def tokens(self, tokens: np.ndarray) -> None:
        self._tokens, self._waiting = tokens, []

    def _do_all_but(self, most: int) -> None:
        with self._arriving:
            while len(self._waiting) > most:
                row, contraction, kept, length = self._waiting.pop(0)
                self._contract(row, contraction, kept.take(), length)

    def start(self, row: int, length: int) -> None:
        """A first write fills all of [0, 1]."""
        self.tokens[row] = length * self.places

    def contract(self, row: int, contraction: float, kept: Kept, length: int) -> None:
        """A write keeps the old signal at ascending positions and adds `length` tokens behind it."""
        self._waiting.append((row, contraction, kept, length))
        self._do_all_but(MOST_WAITING if isinstance(kept.where, Parcel) else 0)

    def _contract(self, row: int, contraction: float, where: np.ndarray, length: int) -> None:
        old, written = self._tokens[row], self._tokens[row, -1]
        kept = np.interp(
            where, self.places, old
        )  # tokens before each sample, which stand at (m + 1/2)/M of the old part
        at = contraction * np.concatenate([[0], (np.arange(where.size) + 0.5) / where.size, [1]])
        before = np.interp(self.places, at, np.concatenate([[0], kept, [written]]))
        behind = written + (self.places - contraction) / (1 - contraction) * length
        self._tokens[row] = np.where(self.places <= contraction, before, behind)

    def at(self, t: np.ndarray, rows: list[int]) -> np.ndarray:
        """Tokens before each place: (T,) -> (rows, T)."""
        return np.array([np.interp(t, self.places, self.tokens[row]) for row in rows]).reshape(len(rows), t.size)

    def __getstate__(self) -> tuple[np.ndarray]:
        return (self.tokens,)

    def __setstate__(self, state: tuple[np.ndarray]) -> None:
        self.__init__(len(state[0]))  # type: ignore[misc]
        self._tokens = state[0]
