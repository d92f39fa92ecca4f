"""What can be asked of a memory's rows: everything that reads them and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backends.arrays import cast, computing_dtype, namespace
from ..backends.devices import HOST
from ..backends.errors import ArgumentError, ShapeError
from ..backends.exchange import to_numpy
from ..backends.registry import current_backend, load
from ..core import checks
from ..core.attention import Reading
from ..core.retrieval import Neighbours
from .device_row import DeviceRow
from .indexes.audit import exact_positions, overlap
from .lock import ReadWriteLock
from .rows import listed, token_array
from .storage import cast_silently, computing


class Retrieving:
    """Search, attention and measurement over `_rows`, each asked by itself."""

    rows: int
    heads: int
    dim: int
    capacity: int
    space: str
    dtype: str
    _place: Any  # where the rows are: HOST, or a device's Place
    _rows: list[Any]  # of Row, or of DeviceRow
    _lock: ReadWriteLock

    @property
    def computing(self) -> np.dtype:
        """What scores and readings are computed in: the stored dtype, at least float32."""
        return computing(self.dtype)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens held now, int64 (rows,)."""
        with self._lock.reading:
            return self._each("stored")

    @property
    def written(self) -> np.ndarray:
        """Tokens in each row's whole history, int64 (rows,); the next token's position."""
        with self._lock.reading:
            return self._each("written")

    def _each(self, count: str) -> np.ndarray:
        """A count of every row, int64 (rows,), for who holds the lock."""
        return np.array([getattr(row, count) for row in self._rows], np.int64)

    def search(self, queries: Any, k: int, rows: Sequence[int] | None = None) -> Neighbours:
        """The k nearest stored tokens of every query, with their keys and values.

        Parameters
        ----------
        queries : array (rows, query_heads, q, dim)
            `query_heads` may be a multiple g of `heads`: query head h then searches memory head h // g.
        k : int
            At least 1; may exceed what is stored.
        rows : sequence of int, optional
            Which rows the first axis stands for; all by default.

        Returns
        -------
        Neighbours
            scores and positions (rows, query_heads, q, k), best first, ties to the newest; positions count the tokens
            of the row's whole history, and are -1, with score -inf and zeros, where fewer than k are stored.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError
        """

        def search(row: Any, numbers: Any) -> tuple[Any, ...]:
            scores, positions = row.search(numbers, k)
            taken = row.gather(positions)
            return scores, positions, taken["keys"], taken["values"], taken["tags"]

        found = self._of_rows(search, queries, rows, k)
        return Neighbours(*(self._ungrouped(parts, queries) for parts in zip(*found, strict=True)))

    def at(self, positions: Any, beside: Any = None) -> Neighbours:
        """The stored tokens at given positions of every row's history, whatever any query thinks of them.

        Parameters
        ----------
        positions : int64 NumPy array (rows, n)
            Of tokens held now; -1 is none, and gives zeros.
        beside : array (...,), optional
            In whose framework, dtype and on whose device keys and values come; NumPy by default.

        Returns
        -------
        Neighbours
            NumPy arrays, unless `beside` says otherwise: keys (rows, heads, n, dim), values (rows, heads, n,
            value_dim), tags (rows, n) or None, and
            `positions` as given; no scores.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            A position that is not held, among others.
        """
        checks.shape("positions", positions, self.rows, "n", whole=True)
        positions = token_array("positions", positions, positions.shape, "integral")
        with self._lock.reading:
            written = self._each("written")
            oldest = (written - self._each("stored"))[:, None]
            if not (((positions >= oldest) & (positions < written[:, None])) | (positions == -1)).all():
                expected = f"positions held now, from {oldest.ravel()} to {written - 1}, or -1"
                raise ArgumentError("positions", expected, str(positions), "Ask for tokens that have not left.")
            taken = [
                row.gather(self._place.take(np.broadcast_to(where, (self.heads, 1, where.size)).copy()))
                for row, where in zip(self._rows, positions, strict=True)
            ]
            keys, values = (self._together([entries[name] for entries in taken], beside) for name in ("keys", "values"))
            tagged = any(entries["tags"] is not None for entries in taken)
            tags = np.full(positions.shape, -1, np.int64)
            for i, entries in enumerate(taken):
                tags[i] = -1 if entries["tags"] is None else to_numpy(entries["tags"])[0, 0]
        return Neighbours(None, positions, keys, values, tags if tagged else None)

    def _together(self, rows: list[Any], beside: Any) -> Any:
        """Vectors (heads, 1, n, d) of every row as one array (rows, heads, n, d)."""
        stacked = namespace(rows[0]).stack(rows)[:, :, 0, ...]
        return to_numpy(stacked) if beside is None else self._place.give(stacked, beside)

    def read(self, queries: Any, k: int = 32, scale: float | None = None, rows: Sequence[int] | None = None) -> Reading:
        """Attention of every query over its k nearest stored tokens.

        Parameters
        ----------
        queries : array (rows, query_heads, q, dim)
            `query_heads` may be a multiple g of `heads`: query head h then reads memory head h // g.
        k : int
        scale : float, optional
            Factor on q·k; 1/sqrt(dim) by default.
        rows : sequence of int, optional
            Which rows the first axis stands for; all by default.

        Returns
        -------
        Reading
            output (rows, query_heads, q, value_dim), lse (rows, query_heads, q), and `neighbours` with scores,
            positions and tags. A row with nothing stored gives output 0 and lse -inf.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError
        """
        scale = 1 / math.sqrt(self.dim) if scale is None else checks.number("scale", scale)

        def read(row: Any, numbers: Any) -> tuple[Any, ...]:
            scores, positions = row.search(numbers, k)
            output, lse = row.attend(numbers, positions, scale, scores if self.space == "ip" else None)
            checks.outcome(output, queries=numbers)
            return output, lse, scores, positions, row.tags_at(positions)

        found = self._of_rows(read, queries, rows, k)
        outputs, lses, *rest = zip(*found, strict=True)
        scores, positions, tags = (self._ungrouped(parts, queries) for parts in rest)
        output, lse = self._ungrouped(outputs, queries), self._ungrouped(lses, queries, computing_dtype(queries))
        return Reading(output, lse, Neighbours(scores, positions, tags=tags))

    def recall(self, queries: Any, k: int = 32, rows: Sequence[int] | None = None) -> float:
        """Share of the true k nearest, as exact search finds them, that `search` finds; 1 where nothing is stored.

        Parameters
        ----------
        queries : array (rows, query_heads, q, dim)
            As for `search`: measure with queries of the kind that will be asked, not with copies of keys.
        k : int
        rows : sequence of int, optional

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError

        Notes
        -----
        Cost of the search, and of an exact one.
        """
        shares = []
        chosen, grouped = self._grouped(queries, rows, k)
        with self._lock.reading:
            for row, numbers in zip((self._rows[row] for row in chosen), grouped, strict=True):
                _, positions = row.search(numbers, k)
                exact = isinstance(row, DeviceRow) or not row.stored
                shares.append(1.0 if exact else overlap(positions, exact_positions(row, numbers, k, self.space)))
        return float(np.mean(shares))

    def _of_rows(self, work: Callable[..., Any], queries: Any, rows: Sequence[int] | None, k: int) -> list[Any]:
        """What `work` finds for every chosen row and its queries, several rows at once where there are threads."""
        chosen, grouped = self._grouped(queries, rows, k)
        with self._lock.reading, self._place.watched():
            tasks = [(self._rows[row], numbers) for row, numbers in zip(chosen, grouped, strict=True)]
            together = getattr(load(current_backend()), "rows_in_parallel", None) if self._place is HOST else None
            return together(work, tasks) if together else [work(*task) for task in tasks]

    def _numbers(self, array: Any) -> Any:
        """The caller's `array` where the memory is, in the dtype that is computed with."""
        taken = self._place.take(array)
        if isinstance(taken, np.ndarray):
            return cast_silently(taken, self.computing)
        return cast(taken, getattr(namespace(taken), self.computing.name))

    def _grouped(self, queries: Any, rows: Sequence[int] | None, k: int) -> tuple[list[int], list[Any]]:
        """The chosen rows, and the queries (heads, group x q, dim) of each, validated, where the memory is."""
        chosen = listed(rows, self.rows)
        if not chosen:
            raise ArgumentError("rows", "at least one row to read", "none", "Skip the read of an empty batch.")
        checks.neighbours(k, self.capacity)
        checks.floating_arrays(queries=queries)
        checks.shape("queries", queries, len(chosen), "query_heads", "q", self.dim, whole=True)
        if queries.shape[1] == 0 or queries.shape[1] % self.heads:
            raise ShapeError(
                "queries",
                f"a multiple of the memory's {self.heads} heads",
                f"{queries.shape[1]} heads",
                "Give every memory head the same number of query heads.",
            )
        numbers = self._numbers(queries)
        checks.measurable(queries=numbers)
        shape = self.heads, queries.shape[1] // self.heads * queries.shape[2], self.dim
        return chosen, [namespace(numbers).reshape(numbers[i, ...], shape) for i in range(len(chosen))]

    def _ungrouped(self, parts: Sequence[Any], queries: Any, dtype: Any = None) -> Any:
        """The rows' results (heads, group x q, ...) as one of the caller's arrays (rows, query_heads, q, ...)."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        xp = namespace(known[0])
        whole = [xp.full_like(known[0], -1) if part is None else part for part in parts]  # untagged: -1
        stacked = xp.stack(whole) if len(whole) > 1 else whole[0][None, ...]  # of one row, nothing is copied
        stacked = xp.reshape(stacked, (*queries.shape[:3], *stacked.shape[3:]))
        return self._place.give(stacked, queries, dtype)
