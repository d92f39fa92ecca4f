"""Inverted lists: a query is compared with the keys of the lists whose centroids suit it best.

Source: Sivic & Zisserman, "Video Google" (ICCV 2003), and Jégou, Douze & Schmid, "Product quantization for nearest
neighbor search" (PAMI 2011), section IV. Here the keys are a stream: lists lose their oldest, and centroids follow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...backends.errors import ArgumentError
from ...backends.registry import current_backend, load
from ...core.retrieval import retrieve, unit
from ..lock import ReadWriteLock
from .audit import ALTERED, Audit, overlap
from .centroids import nearest, train
from .exact import ExactIndex, written_since
from .probing import Probing
from .protocol import Held, Ring, turnovers

FIRST = 4096  # keys from which lists are worth their while; fewer are searched exactly


class IVFIndex:
    """About sqrt(n) lists a head; of them a query's best few are searched, and what is found is scored in full.

    Centroids are trained when FIRST keys are stored, again when the row has doubled since, and from then on twice in
    every turnover. How many lists are searched follows from audits, from the first search on; if it is all of them,
    the search is exact.
    """

    def __init__(self, heads: int, dim: int, space: str, dtype: np.dtype, target: float, seed: int):
        self.given = (heads, dim, space, dtype, target, seed)
        self.heads, self.space, self.seed = heads, space, seed
        self.exact: ExactIndex | None = ExactIndex(heads, dim, space, dtype)
        self.audit = Audit(target)
        self.followed = self.trained_at = self.trained_on = self.trainings = 0
        self.centroids: Any = None  # (heads, lists, dim), from the first training on
        self.ranking: Any = None  # an ExactIndex of the centroids
        self.labels = np.empty((heads, 0), np.int32)  # of every slot
        self.probing = Probing(0, target)
        self.lists: Any = None  # a head, where the backend has them
        self.lock = ReadWriteLock().writing

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self.given, self.state())

    @property
    def nbytes(self) -> int:
        own = self.labels.nbytes + (0 if self.centroids is None else self.centroids.nbytes)
        own += sum(index.nbytes for index in (self.exact, self.ranking) if index)
        return own + sum(made.nbytes for made in self.lists or ())

    def state(self) -> dict[str, np.ndarray]:
        """What the keys alone do not say: centroids, which key is in which list, and the measured recall."""
        with self.lock:  # a reader may be following meanwhile, and labels in place
            if self.centroids is None:
                return {}
            slots = self.labels.shape[1]
            counts = (slots, self.followed, self.trained_at, self.trained_on, self.trainings)
            return {
                "centroids": self.centroids,
                "labels": self.labels.copy(),
                "counts": np.array(counts, np.int64),
                **self.audit.state(*self.given[:2]),
                **self.probing.state(),
            }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        if state:
            centroids, labels = (state.get(name, np.empty(0)) for name in ("centroids", "labels"))
            counts = state.get("counts", np.empty(0))
            fits = centroids.ndim == 3 and centroids.shape[::2] == self.given[:2] and counts.shape == (5,)
            fits = fits and labels.shape == (self.heads, counts[0]) and labels.dtype == np.int32
            fits = fits and bool(np.isfinite(centroids).all() and (counts >= 0).all())
            if not fits or (labels.size and not 0 <= labels.min() <= labels.max() < centroids.shape[1]):
                raise ArgumentError("state", "the state of inverted lists of this size", "another", ALTERED)
            self.probing = Probing(centroids.shape[1], self.audit.target)
            self.probing.restore(state)
            self.centroids, self.labels, self.exact = state["centroids"], state["labels"], None
            _, self.followed, self.trained_at, self.trained_on, self.trainings = map(int, counts)
            self.audit.restore(state, *self.given[:2])

    def explain(self) -> str:
        if self.centroids is None:
            return f"exact until {FIRST} keys are stored, then inverted lists"
        much = ", more than half: exact search would cost no more" if 2 * self.probes > self.probing.lists else ""
        return (
            f"{self.probes} of {self.probing.lists} inverted lists a query{much}; expected recall "
            f"{self.probing.recall:.3f} by {self.audit.audited} queries audited, target {self.audit.target}"
        )

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked = unit(queries) if self.space == "cosine" else queries
        with self.lock:
            self.follow(row)
            exact = self.exact
            audited = self.audit.taken(asked, turnovers(row)) if exact is None else None
        if exact is not None:
            return exact.search(row, queries, k)
        if audited is not None:
            self.learn(row, audited, k)
        scores, positions = self.search_lists(row, asked, k, self.best_lists(asked, self.probes))
        self.complete(row, queries, scores, positions)
        return scores, positions

    @property
    def probes(self) -> int:
        """How many lists are searched for a query."""
        return self.probing.probes

    @property
    def probed(self) -> float | None:
        """Share of the lists that a search visits, once audits have measured it."""
        return self.probes / self.probing.lists if self.audit.audited else None

    def search_lists(self, row: Ring, queries: np.ndarray, k: int, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (heads, q, k) of the best keys of the lists best (heads, q, probes)."""
        lists = self.lists
        if lists is None:
            return self.by_formula(row, queries, k, best)
        keys, _ = row.part("keys", (slice(None), slice(0, row.stored)))
        sure = best.shape[2] == self.probing.lists
        return load(current_backend()).search_lists(lists, queries, k, best, keys, row.start, row.oldest, sure)

    def best_lists(self, queries: np.ndarray, count: int) -> np.ndarray:
        """The lists whose centroids suit queries (heads, q, dim) best, the best first: (heads, q, count)."""
        return self.ranking.search(Held(self.centroids), queries, count)[1]

    def by_formula(self, row: Ring, queries: np.ndarray, k: int, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the lists are to find: the best of the keys whose list is probed."""
        stored = (slice(None), slice(0, row.stored))
        probed = np.zeros((*best.shape[:2], self.centroids.shape[1]), bool)
        np.put_along_axis(probed, best, True, axis=-1)
        labels = np.roll(self.labels[stored], -row.start, axis=1)
        mask = np.take_along_axis(probed, labels[:, None, :].astype(np.int64), axis=-1)
        scores, ages = retrieve(queries, self.numbers(row, stored), k, self.scored, mask, row.start)
        return scores, np.where(ages >= 0, ages + row.oldest, -1)

    def complete(self, row: Ring, queries: np.ndarray, scores: np.ndarray, positions: np.ndarray) -> None:
        """Search exactly for the queries whose lists hold fewer than k keys although more are stored."""
        short = (positions[..., min(positions.shape[2], row.stored) - 1] < 0).any(axis=0)
        if short.any():
            keys = row.numbers("keys", (slice(None), slice(0, row.stored)))
            found, ages = retrieve(queries[:, short], keys, positions.shape[2], self.space, None, row.start)
            scores[:, short], positions[:, short] = found, np.where(ages >= 0, ages + row.oldest, -1)

    def learn(self, row: Ring, queries: np.ndarray, k: int) -> None:
        """From audited queries (heads, q, dim), how many lists to search: by the ranks of their neighbours' lists."""
        lists = self.probing.lists
        order = self.best_lists(queries, lists)
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.broadcast_to(np.arange(lists), order.shape), axis=-1)
        _, true = self.search_lists(row, queries, k, order)
        slots = np.where(true >= 0, true % row.capacity, 0)
        labels = np.take_along_axis(self.labels[:, None, :], slots.reshape(self.heads, 1, -1), axis=-1)
        ranks = np.take_along_axis(ranks, labels.reshape(true.shape).astype(np.int64), axis=-1)
        with self.lock:
            self.probing.observe(ranks, true >= 0, self.audit.trust(turnovers(row)))
            probes = self.probes
        searched = np.where(ranks < probes, true, -1)
        missed = 1 - overlap(self.search_lists(row, queries, k, order[..., :probes])[1], searched)
        with self.lock:
            self.probing.lose(missed * (searched >= 0).sum() / max((true >= 0).sum(), 1), queries.shape[1])

    @property
    def scored(self) -> str:
        """The space of what `numbers` gives."""
        return "ip" if self.space == "cosine" else self.space

    def numbers(self, row: Ring, where: Any) -> np.ndarray:
        keys = row.numbers("keys", where)
        return unit(keys) if self.space == "cosine" else keys

    def follow(self, row: Ring) -> None:
        """Put the keys that came since into lists, and take out those that left; train where it is due."""
        make = getattr(load(current_backend()), "make_lists", None)
        if self.centroids is None and row.stored < FIRST:
            return
        since = row.written - self.trained_at
        full = row.stored == row.capacity
        if self.centroids is None or since >= (max(row.stored // 2, 1) if full else self.trained_on):
            self.retrain(row)
        elif self.followed < row.written:
            self.label(row, written_since(row, self.followed))
        if self.ranking is None:
            self.ranking = ExactIndex(self.heads, self.given[1], self.scored, self.centroids.dtype)
        if make is None:
            self.lists = None
        elif self.lists is None:
            self.lists = self.made(row, make)
        elif self.followed < row.written:
            lists, self.lists = self.lists, None  # made anew by the next search, should this one fail half-way
            for made in lists:
                made.forget(row.oldest)
            self.append(lists, row, max(self.followed, row.oldest), written_since(row, self.followed))
            self.lists = lists
        self.followed = row.written

    def retrain(self, row: Ring) -> None:
        lists = 1 << round(math.log2(math.sqrt(row.stored)))
        keys = self.numbers(row, (slice(None), slice(0, row.stored)))
        before = self.centroids if self.centroids is not None else [None] * self.heads
        rngs = (np.random.default_rng([self.seed, h, self.trainings]) for h in range(self.heads))
        trained = zip(keys, before, rngs, strict=True)
        self.centroids = np.stack([train(some, lists, old, rng, self.space != "l2") for some, old, rng in trained])
        if before[0] is None or len(before[0]) != lists:  # what was learned about other lists does not carry over
            self.probing = Probing(lists, self.audit.target)
            self.audit.restart()
        self.label(row, [slice(0, row.stored)])
        self.trained_at, self.trained_on, self.trainings = row.written, row.stored, self.trainings + 1
        self.exact = self.ranking = self.lists = None

    def label(self, row: Ring, ranges: list[slice]) -> None:
        if self.labels.shape[1] < row.slots:
            more = np.zeros((self.heads, row.slots - self.labels.shape[1]), np.int32)
            self.labels = np.concatenate([self.labels, more], axis=1)
        for slots in ranges:
            keys = self.numbers(row, (slice(None), slots))
            for h in range(self.heads):
                self.labels[h, slots] = nearest(keys[h], self.centroids[h])

    def made(self, row: Ring, make: Any) -> list[Any]:
        """The lists over all that is stored, oldest first."""
        _, count, dim = self.centroids.shape
        lists = [make(count, dim, self.space, self.given[3]) for _ in range(self.heads)]
        self.append(lists, row, row.oldest, written_since(row, row.oldest))
        return lists

    def append(self, lists: list[Any], row: Ring, position: int, ranges: list[slice]) -> None:
        for slots in ranges:
            keys = self.numbers(row, (slice(None), slots))
            for h, made in enumerate(lists):
                made.write(keys[h], position, self.labels[h, slots])
            position += slots.stop - slots.start


def restored(given: tuple[Any, ...], state: dict[str, np.ndarray]) -> IVFIndex:
    """A copy of an index, for the copy of its row."""
    made = IVFIndex(*given)
    made.restore({name: array.copy() for name, array in state.items()})
    return made
