"""How many lists to search: the fewest that, by what audits have seen, are all but sure to find the wanted share."""

from __future__ import annotations

import math

import numpy as np

from ...backends.errors import ArgumentError
from .audit import ALTERED, weight_of_past

SURE = 2.0  # standard errors below the mean that still have to reach the target


class Probing:
    """What audited queries would have found with every number of lists.

    A neighbour is found if its list is among those searched, so an audit says at once what share every number of lists
    has. Queries differ widely, most finding all in few lists and some little in many: the mean over a few dozen is too
    uncertain to go by, and what has to reach the target is the lower end of its interval of confidence. One query that
    finds nothing anywhere is counted in, so that few queries are not trusted however much they agree.
    """

    def __init__(self, lists: int, target: float):
        self.lists, self.target = lists, target
        self.probes = lists
        self.shares = np.zeros((2, lists))  # sums over queries: of the share found with 1, 2, ... lists, and its square
        self.sums = np.zeros(3)  # likewise of weights, their squares, and the share lost in lists that were searched

    def observe(self, ranks: np.ndarray, wanted: np.ndarray, trust: float = 1.0) -> None:
        """Take in the ranks (heads, q, k), among a query's lists, of the lists of its true neighbours, where wanted.

        `trust` is the weight that what was observed before has kept.
        """
        q = ranks.shape[1]
        counts = np.zeros((q, self.lists))
        np.add.at(counts, (np.broadcast_to(np.arange(q)[None, :, None], ranks.shape)[wanted], ranks[wanted]), 1)
        found = np.cumsum(counts, axis=1)
        shares = found / np.maximum(found[:, -1:], 1)
        past = trust * weight_of_past(q)
        self.shares = past * self.shares + np.stack([shares.sum(axis=0), (shares**2).sum(axis=0)])
        self.sums = np.array([past, past**2, past]) * self.sums + [q, q, 0]
        self.choose()

    def lose(self, share: float, queries: int) -> None:
        """Count in the share of the true neighbours of the queries just observed that searched lists did not give."""
        self.sums = self.sums + np.array([0, 0, share * queries])  # not in place: it may be about to be saved

    def choose(self) -> None:
        weight, squares = self.sums[:2] + 1  # and one query that finds nothing
        mean, square = self.shares / weight
        error = np.sqrt(np.maximum(square - mean**2, 0) * squares) / weight
        enough = mean - SURE * error >= self.target + self.lost
        self.probes = int(np.argmax(enough)) + 1 if enough.any() else self.lists

    @property
    def lost(self) -> float:
        """Share of the neighbours that a search misses in lists it does search."""
        return float(self.sums[2] / max(self.sums[0], 1))

    @property
    def recall(self) -> float:
        """What is expected of the present number of lists."""
        if self.sums[0] == 0 or self.probes == self.lists:
            return 1.0
        return float(self.shares[0, self.probes - 1] / self.sums[0]) - self.lost

    def state(self) -> dict[str, np.ndarray]:
        return {"shares": self.shares, "sums": self.sums, "probes": np.array([self.probes], np.int64)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from `state`.

        Raises
        ------
        ArgumentError
            Not the state of so many lists.
        """
        shares, sums, probes = (state.get(name, np.empty(0)) for name in ("shares", "sums", "probes"))
        fits = shares.shape == self.shares.shape and sums.shape == (3,) and probes.shape == (1,)
        if not fits or not (shares >= 0).all() or not (sums >= 0).all() or not 1 <= probes[0] <= self.lists:
            raise ArgumentError("state", f"what was learned about {self.lists} lists", "another", ALTERED)
        if not math.isfinite(float(shares.sum() + sums.sum())):
            raise ArgumentError("state", "finite numbers", "others", ALTERED)
        self.shares, self.sums, self.probes = shares.copy(), sums.copy(), int(probes[0])
