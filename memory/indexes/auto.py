"""Which index? The one whose step costs least, by what the memory is used for: its size, its reads and its writes.

A step is one write of w tokens and one search of q queries among n keys of d components. Costs are counted in
multiply-adds of exact search, so that only the ratios in `Costs` depend on the machine; they are estimates, in line
with benchmarks/retrieval.py on one machine, and not measured anew on each.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...backends.errors import ArgumentError
from .audit import ALTERED
from .hnsw import PARTS
from .protocol import Index, Ring

MEMORY = 0.9  # weight of the past in what a step is taken to be
EVERY = 32  # searches from one choice to the next
BETTER = 0.7  # another index must promise this share of the present one's cost: to change is to build anew


@dataclass(frozen=True)
class Costs:
    """What the parts of a step cost, in multiply-adds of exact search of many queries."""

    few: float = 3.0  # factor on exact search of one query, which waits for the memory
    lists: float = 3.0  # factor on a key that is searched in a list
    probed: float = 0.12  # share of the lists that a target recall of 0.95 takes
    trained: float = 4600.0  # a token's share in training, in keys compared
    walked: float = 90.0  # factor on a key that a walk through a graph compares
    built: float = 41000.0  # a token's share in building a graph, in keys compared


class AutoIndex:
    """Holds one of the others, and reconsiders after every EVERY searches."""

    def __init__(self, make: dict[str, Callable[[], Index]], costs: Costs):
        self.make, self.costs, self.name = make, costs, "exact"
        self.index: Any = make["exact"]()
        self.queries = self.written = 0.0  # a step's, on average
        self.searches = self.seen = 0
        self.estimates: dict[str, float] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self.make, self.costs, self.state())

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def state(self) -> dict[str, np.ndarray]:
        """What is chosen, on what grounds, and the chosen index's own state."""
        which = list(self.make).index(self.name)
        numbers = np.array([which, self.queries, self.written, self.searches, self.seen], np.float64)
        return {"auto": numbers, **self.index.state()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        numbers = state.get("auto", np.empty(0))
        if numbers.shape != (5,) or not 0 <= numbers[0] < len(self.make):
            raise ArgumentError("state", "the state of an automatic index", f"auto = {numbers}", ALTERED)
        which, self.queries, self.written, searches, seen = (float(number) for number in numbers)
        self.searches, self.seen = int(searches), int(seen)
        self.name = list(self.make)[int(which)]
        self.index = self.make[self.name]()
        self.index.restore({name: array for name, array in state.items() if name != "auto"})

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        with self.lock:
            first = self.searches == 0
            weight = 0.0 if first else MEMORY
            self.queries = weight * self.queries + (1 - weight) * queries.shape[1]
            self.written = weight * self.written + (1 - weight) * (0 if first else row.written - self.seen)
            self.searches, self.seen = self.searches + 1, row.written
            if self.searches % EVERY == 0:
                self.choose(row.stored, queries.shape[2])
            index = self.index
        return index.search(row, queries, k)

    def choose(self, n: int, d: int) -> None:
        self.estimates = estimate(n, d, self.queries, self.written, self.costs)
        self.estimates = {name: cost for name, cost in self.estimates.items() if name in self.make}
        cheapest = min(self.estimates, key=self.estimates.__getitem__)
        if cheapest != self.name and self.estimates[cheapest] < BETTER * self.estimates[self.name]:
            self.name, self.index = cheapest, self.make[cheapest]()

    def explain(self) -> str:
        costs = ", ".join(f"{name} {cost / 1e6:.3g}" for name, cost in self.estimates.items()) or "not yet compared"
        step = f"{self.queries:.0f} queries and {self.written:.0f} tokens a step"
        return f"auto: {self.name} ({self.index.explain()}), for {step}; million multiply-adds a head: {costs}"


def estimate(n: int, d: int, queries: float, written: float, costs: Costs) -> dict[str, float]:
    """The cost of a step with each index, in multiply-adds."""
    waiting = 1 + (costs.few - 1) / max(queries, 1)
    lists = math.sqrt(max(n, 1))
    walk = 64 * math.log2(n / PARTS + 2)  # keys compared in one graph, at beam 64
    return {
        "exact": queries * n * d * waiting,
        "ivf": queries * d * (lists + costs.lists * costs.probed * n * waiting) + written * d * (costs.trained + lists),
        "hnsw": queries * d * PARTS * walk * costs.walked + written * d * costs.built,
    }


def restored(make: dict[str, Callable[[], Index]], costs: Costs, state: dict[str, np.ndarray]) -> AutoIndex:
    """A copy of an index, for the copy of its row."""
    made = AutoIndex(make, costs)
    made.restore(state)
    return made
