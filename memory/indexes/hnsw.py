"""Hierarchical navigable small worlds over the settled part of a row; everything else is searched exactly.

Source: Malkov & Yashunin, "Efficient and robust approximate nearest neighbor search using hierarchical navigable small
world graphs" (PAMI 2018, arXiv 1603.09320), as implemented by hnswlib. A graph cannot forget, and hnswlib corrupts or
crashes when it is asked to delete, grow, load or save beside other calls. So it is asked for none of that: tokens are
cut by position into segments, and a graph is built once over those that are complete, by one thread from one seed:
over each as it becomes complete, or over all there are, where a row was filled before it was asked and has lost nothing
yet. It is dropped whole as soon as one of its tokens has left. What is not in a graph, at either end of the row, is
searched exactly. Every hit is scored again in full, so that graphs choose candidates and nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...backends.arrays import optional_import
from ...backends.errors import ArgumentError, RecallError
from ...backends.registry import current_backend, load
from ...core import checks
from ...core.retrieval import retrieve, unit
from ..lock import ReadWriteLock
from ..storage import cast_silently
from .audit import ALTERED, Audit, exact_positions
from .exact import written_between
from .protocol import Ring, turnovers

LINKS, BREADTH = 16, 200  # hnswlib's M and ef_construction
SMALLEST, PARTS = 1024, 8  # tokens of a segment at least; segments in a full row otherwise
MOST = 4096  # the widest search beam that tuning goes to
REMEDY = 'Queries of attention are often unlike any key: prefer index="exact" or "ivf", or raise dim and M by hand.'


class HNSWIndex:
    """Graphs over complete segments, exact search over the rest; the beam width `ef` follows the audited recall."""

    def __init__(self, heads: int, dim: int, space: str, capacity: int, target: float, seed: int):
        self.given = (heads, dim, space, capacity, target, seed)
        self.heads, self.dim, self.space, self.seed = heads, dim, space, seed
        self.segment = max(capacity // PARTS, SMALLEST)
        self.graphs: dict[tuple[int, int], list[Any]] = {}  # first and last position -> a graph a head
        self.saved: list[tuple[int, int]] = []  # of graphs that are to be built again
        self.followed = 0  # tokens of the row's history that graphs were made or dropped for
        self.ef, self.audit, self.lock = 64, Audit(target), ReadWriteLock().writing
        self.library = optional_import("hnswlib", extra="hnsw")

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self.given, self.state())

    @property
    def nbytes(self) -> int:
        """Bytes of the graphs, estimated: the vectors once more, and the links of every node."""
        node = 4 * self.dim + 4 * (2 * LINKS + 1) + 16
        return sum(last - first for first, last in self.graphs) * self.heads * node

    def state(self) -> dict[str, np.ndarray]:
        """The beam width, the measured recall, and what graphs are over: they are built again, the same."""
        with self.lock:  # a reader may be building what was saved
            runs = np.array([*self.graphs, *self.saved], np.int64).reshape(-1, 2)
            return {"ef": np.array([self.ef], np.int64), "runs": runs, **self.audit.state(self.heads, self.dim)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        ef = state.get("ef", np.empty(0))
        if ef.shape != (1,) or not 1 <= ef[0] <= MOST:
            raise ArgumentError("state", f"a beam width from 1 to {MOST}", f"ef = {ef}", ALTERED)
        runs = state.get("runs", np.empty((0, 2), np.int64))
        edges = runs.ravel()
        if (
            runs.shape != (len(runs), 2)
            or (edges < 0).any()
            or (edges % self.segment).any()
            or (np.diff(edges) < 0).any()
        ):
            raise ArgumentError("state", f"runs of segments of {self.segment}", f"{runs}", ALTERED)
        self.ef, self.saved = int(ef[0]), [(int(first), int(last)) for first, last in runs if first < last]
        self.audit.restore(state, self.heads, self.dim)

    def explain(self) -> str:
        return (
            f"{len(self.graphs)} graphs over {sum(last - first for first, last in self.graphs)} tokens, "
            f"beam {self.ef}, the rest exact; {self.audit.explain()}"
        )

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if queries.dtype != np.float32 and self.space != "cosine":
            checks.measurable(queries=cast_silently(queries, np.float32))
        with self.lock:
            self.follow(row)
            graphs, ef = self.graphs, max(self.ef, k)
            audited = self.audit.taken(queries, turnovers(row)) if graphs else None
        if audited is not None:
            self.learn(row, audited, k, graphs, ef)
        return self.found(row, queries, k, graphs, ef)

    def learn(self, row: Ring, queries: np.ndarray, k: int, graphs: dict[tuple[int, int], list[Any]], ef: int) -> None:
        """Widen the beam if audited queries (heads, q, dim) say so."""
        _, positions = self.found(row, queries, k, graphs, ef)
        exact = exact_positions(row, queries, k, self.space)
        with self.lock:
            self.audit.observe(positions, exact)
            if self.audit.recall < self.audit.target and self.ef >= MOST:
                self.audit.warn('index="hnsw"', REMEDY)
            elif self.audit.recall < self.audit.target:
                self.ef = min(2 * self.ef, MOST)
                self.audit.restart()

    def found(
        self, row: Ring, queries: np.ndarray, k: int, graphs: dict[tuple[int, int], list[Any]], ef: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (heads, q, k) by the graphs with beam `ef`, and by exact search of what is in none."""
        if row.stored == 0:
            shape = *queries.shape[:2], k
            return np.full(shape, -np.inf, queries.dtype), np.full(shape, -1, np.int64)
        asked = unit(queries) if self.space == "cosine" else queries
        narrow = cast_silently(asked, np.float32)
        backend = load(current_backend())

        def ask(h: int) -> np.ndarray:
            return self.candidates(row, h, queries[h], narrow[h], k, graphs, ef)

        heads = [(h,) for h in range(self.heads)]
        together = getattr(backend, "rows_in_parallel", None)
        found = together(ask, heads) if together else [ask(*head) for head in heads]
        positions = found[0][None] if len(found) == 1 else np.stack(found)
        direct = getattr(backend, "rescore", None)
        if direct is not None:
            best = direct(asked, row.part("keys", ...)[0], positions, k, self.space, row.stored, row.oldest)
            if best is not NotImplemented:
                return best
        return self.by_formula(row, queries, k, positions)

    def follow(self, row: Ring) -> None:
        """Drop the graphs that a token has left; build those of the segments that became complete."""
        if self.followed == row.written and not self.saved:
            return
        graphs = {run: made for run, made in self.graphs.items() if row.oldest <= run[0]}
        for run in self.saved:
            if row.oldest <= run[0] and run[1] <= row.written:
                graphs[run] = self.built(row, *run)
        first, last = (edge * self.segment for edge in (-(-row.oldest // self.segment), row.written // self.segment))
        covered = sorted(graphs)
        for start, end in zip([first, *(b for _, b in covered)], [*(a for a, _ in covered), last], strict=True):
            step = max(end - start, 1) if row.oldest == 0 else self.segment
            for at in range(start, end, step):
                graphs[at, at + step] = self.built(row, at, at + step)
        self.graphs, self.saved, self.followed = dict(sorted(graphs.items())), [], row.written

    def built(self, row: Ring, first: int, last: int) -> list[Any]:
        """A graph a head over the tokens at positions first <= p < last."""
        positions = np.arange(first, last)
        keys = row.numbers("keys", (slice(None), positions % row.capacity)).astype(np.float32, copy=False)
        return [self.build(some, positions) for some in keys]

    def build(self, keys: np.ndarray, positions: np.ndarray) -> Any:
        made = self.library.Index(space="l2" if self.space == "l2" else "ip", dim=self.dim)
        made.init_index(max_elements=len(keys), M=LINKS, ef_construction=BREADTH, random_seed=self.seed + 100)
        made.add_items(unit(keys) if self.space == "cosine" else keys, positions, num_threads=1)
        return made

    def candidates(
        self,
        row: Ring,
        head: int,
        queries: np.ndarray,
        narrow: np.ndarray,
        k: int,
        graphs: dict[tuple[int, int], list[Any]],
        ef: int,
    ) -> np.ndarray:
        """Positions (q, m) that both exact ends give for queries (q, dim), and graphs for the same in their dtype."""
        parts = [self.ask(made[head], narrow, k, ef) for made in graphs.values()]
        for first, last in self.ends(row, graphs):
            for slots in written_between(row, first, last):
                keys = row.numbers("keys", (head, slots))
                _, ages = retrieve(queries, keys, k, self.space, None, 0)
                parts.append(np.where(ages >= 0, ages + first, -1))
                first += len(keys)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def ends(self, row: Ring, graphs: dict[tuple[int, int], list[Any]]) -> list[tuple[int, int]]:
        """The ranges of positions that no graph holds: all, or what is older and what is newer than the graphs."""
        if not graphs:
            return [(row.oldest, row.written)] if row.stored else []
        first, last = min(graphs)[0], max(graphs)[1]
        return [(a, b) for a, b in ((row.oldest, first), (last, row.written)) if a < b]

    def ask(self, graph: Any, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
        """The positions (q, min(k, tokens)) that a graph finds."""
        some = min(k, graph.element_count)
        graph.set_ef(max(ef, some))
        try:
            positions, _ = graph.knn_query(queries, k=some, num_threads=1)
        except RuntimeError as error:
            expected = f"{some} neighbours from a graph of {graph.element_count}"
            raise RecallError("search", expected, f"fewer ({error})", "Use index='exact'.") from error
        return positions.view(np.int64)

    def by_formula(
        self, row: Ring, queries: np.ndarray, k: int, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the candidates positions (heads, q, m), by (score, newest), scored in full."""
        positions = np.sort(positions, axis=-1)  # by age, so that ties go to the newest; nothing (-1) first
        heads = np.arange(self.heads)[:, None, None]
        keys = row.numbers("keys", (heads, np.where(positions >= 0, positions % row.capacity, 0)))
        mask = (positions >= 0)[..., None, :]
        scores, order = retrieve(queries[..., None, :], keys, k, self.space, mask, 0)
        chosen = np.take_along_axis(positions, np.maximum(order[..., 0, :], 0), axis=-1)
        return scores[..., 0, :], np.where(order[..., 0, :] >= 0, chosen, -1)


def restored(given: tuple[Any, ...], state: dict[str, np.ndarray]) -> HNSWIndex:
    """A copy of an index, for the copy of its row."""
    made = HNSWIndex(*given)
    made.restore(state)
    return made
