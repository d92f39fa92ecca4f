"""Which token of a row's history each place of its signal shows, through every contraction and sticky sample."""

from __future__ import annotations

import numpy as np

KNOTS = 513  # places at which the monotone map from [0, 1] to tokens is held, linear between


class Timeline:
    """A monotone map a row: `tokens[row, i]` of the row's history lie before the place i/(KNOTS - 1)."""

    def __init__(self, rows: int):
        self.places = np.linspace(0, 1, KNOTS)
        self.tokens = np.zeros((rows, KNOTS))

    def start(self, row: int, length: int) -> None:
        """A first write fills all of [0, 1]."""
        self.tokens[row] = length * self.places

    def contract(self, row: int, contraction: float, where: np.ndarray, length: int) -> None:
        """A write keeps the old signal at ascending positions `where` (M,) and adds `length` tokens behind it."""
        old, written = self.tokens[row], self.tokens[row, -1]
        kept = np.interp(
            where, self.places, old
        )  # tokens before each sample, which stand at (m + 1/2)/M of the old part
        at = contraction * np.concatenate([[0], (np.arange(where.size) + 0.5) / where.size, [1]])
        before = np.interp(self.places, at, np.concatenate([[0], kept, [written]]))
        behind = written + (self.places - contraction) / (1 - contraction) * length
        self.tokens[row] = np.where(self.places <= contraction, before, behind)

    def at(self, t: np.ndarray, rows: list[int]) -> np.ndarray:
        """Tokens before each place: (T,) -> (rows, T)."""
        return np.array([np.interp(t, self.places, self.tokens[row]) for row in rows]).reshape(len(rows), t.size)
