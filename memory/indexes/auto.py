"""Which index? The one whose step costs least, by what the memory is used for: its size, its reads and its writes.

A step is one write of w tokens and one search of q queries among n keys of d components. What its parts cost is
measured on the machine, or given (costs.py); what is counted here is how many there are. To make another index takes
time too: it is made once the steps since the last change would have saved as much, so that at worst twice as much is
spent as by who knows how many are to come (ski rental: Karlin et al., "Competitive snoopy caching", Algorithmica 1988).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...backends.errors import ArgumentError
from ..lock import ReadWriteLock
from . import ivf
from .audit import ALTERED
from .costs import WALK, Costs, machine_costs
from .hnsw import PARTS
from .protocol import Index, Ring

MEMORY = 0.9  # weight of the past in what a step is taken to be
EVERY, SOONER = 32, 8  # searches from one choice to the next, and how many times fewer where each has
MANY = 256  # queries a head
BETTER = 0.7  # another index must promise this share of the present one's cost: estimates are no more exact than that
LEAST = 4096  # keys below which exact search is the cheapest, whatever things cost


class AutoIndex:
    """Holds one of the others, and reconsiders after every EVERY searches, sooner where each asks much."""

    def __init__(self, make: dict[str, Callable[[], Index]], target: float, costs: Costs | None):
        self.make, self.target, self.costs, self.name = make, target, costs, "exact"
        self.index: Any = make["exact"]()
        self.queries = self.written = 0.0  # a step's, on average
        self.searches = 0  # since the last change
        self.seen = 0
        self.refused: tuple[str, ...] = ()  # graphs, once they have missed their recall
        self.probed = 0.0  # share of the lists that audits asked for when there last were lists; 0 is unknown
        self.estimates: dict[str, float] = {}
        self.lock = ReadWriteLock().writing

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self.make, self.target, self.costs, self.state())

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def state(self) -> dict[str, np.ndarray]:
        """What is chosen, on what grounds, and the chosen index's own state."""
        with self.lock:
            which = list(self.make).index(self.name)
            numbers = [which, self.queries, self.written, self.searches, self.seen, self.probed, bool(self.refused)]
            return {"auto": np.array(numbers, np.float64), **self.index.state()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        if not state:  # of a memory on a device, which has no index
            return
        numbers = state.get("auto", np.empty(0))
        numbers = np.append(numbers, [0, 0]) if numbers.shape == (5,) else numbers  # an older one
        if numbers.shape != (7,) or not 0 <= numbers[0] < len(self.make):
            raise ArgumentError("state", "the state of an automatic index", f"auto = {numbers}", ALTERED)
        which, self.queries, self.written, searches, seen, self.probed, refused = (float(number) for number in numbers)
        self.searches, self.seen, self.refused = int(searches), int(seen), ("hnsw",) if refused else ()
        self.name = list(self.make)[int(which)]
        self.index = self.make[self.name]()
        self.index.restore({name: array for name, array in state.items() if name != "auto"})

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        with self.lock:
            first = self.queries == 0
            weight = 0.0 if first else MEMORY
            self.queries = weight * self.queries + (1 - weight) * queries.shape[1]
            self.written = weight * self.written + (1 - weight) * (0 if first else row.written - self.seen)
            self.searches, self.seen = self.searches + 1, row.written
            if self.searches % (EVERY if self.queries < MANY else max(EVERY // SOONER, 1)) == 0:
                self.choose(row.stored, queries.shape[2])
            index = self.index
        return index.search(row, queries, k)

    def choose(self, n: int, d: int) -> None:
        """Change to the cheapest index, if it is much cheaper; a graph that missed its recall is not asked again."""
        if self.costs is None and n >= LEAST:
            self.costs = machine_costs()
        if self.costs is None:
            return
        if self.name == "hnsw" and self.index.audit.warned:
            self.refused = ("hnsw",)
        if self.name == "ivf":
            self.probed = self.index.probed or self.probed
        every = estimate(n, d, self.queries, self.written, self.target, self.costs, self.probed or None)
        self.estimates = {n: cost for n, cost in every.items() if n in self.make and n not in self.refused}
        cheapest = min(self.estimates, key=self.estimates.__getitem__)
        present, least = self.estimates.get(self.name, math.inf), self.estimates[cheapest]
        if least < BETTER * present and self.searches * (present - least) >= building(n, d, self.costs)[cheapest]:
            self.name, self.index, self.searches = cheapest, self.make[cheapest](), 0

    def explain(self) -> str:
        step = f"{self.queries:.0f} queries and {self.written:.0f} tokens a step"
        if self.costs is None:
            why = f"below {LEAST} keys nothing else is cheaper"
        else:
            costs = ", ".join(f"{name} {cost:.3g}" for name, cost in self.estimates.items()) or "not yet compared"
            why = f"estimated ms a head: {costs}; costs {self.costs.source}"
        return f"auto: {self.name} ({self.index.explain()}), for {step}; {why}"


def estimate(
    n: int, d: int, queries: float, written: float, target: float, costs: Costs, probed: float | None = None
) -> dict[str, float]:
    """Milliseconds of a step with each index; `probed` is the share of the lists that is searched, where known."""
    waiting = 1 + (costs.few - 1) / max(queries, 1)
    lists = math.sqrt(max(n, 1))
    if probed is None:  # what is missed falls about exponentially with what is searched
        probed = min(costs.probed * math.log(max(1 - target, 1e-9)) / math.log(0.05), 1.0)
    walk = WALK * math.log2(n / PARTS + 2)  # keys compared in one graph
    counts = {
        "exact": queries * n * waiting,
        "ivf": queries * (lists + costs.lists * probed * n * waiting) + written * (costs.trained * lists + lists),
        "hnsw": queries * PARTS * walk * costs.walked + written * costs.built * math.log2(n / PARTS + 2),
    }
    if target == 1:
        del counts["ivf"], counts["hnsw"]  # which promise less
    elif n < ivf.FIRST:
        counts["ivf"] = counts["exact"]  # what it is, up to there
    return {name: 1e-6 * costs.scanned * d * count for name, count in counts.items()}


def building(n: int, d: int, costs: Costs) -> dict[str, float]:
    """Milliseconds to make each index of n keys; panels and codes are made in the time of a few searches."""
    lists = math.sqrt(n) if n >= ivf.FIRST else 0  # which are trained twice in a turnover, once now
    counts = {"exact": 0.0, "ivf": costs.trained / 2 * lists, "hnsw": costs.built * math.log2(n / PARTS + 2)}
    return {name: 1e-6 * costs.scanned * d * n * count for name, count in counts.items()}


def restored(make: dict[str, Callable[[], Index]], target: float, costs: Any, state: dict[str, Any]) -> AutoIndex:
    """A copy of an index, for the copy of its row."""
    made = AutoIndex(make, target, costs)
    made.restore(state)
    return made
