"""Recent tokens exactly, all older ones as a continuous signal, and one softmax over what a read finds of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self, cast

import numpy as np

from ..backends.arrays import computing_dtype
from ..backends.errors import ArgumentError
from ..backends.exchange import like, to_numpy
from ..core import checks
from ..core.attention import Reading, masked_softmax, merge
from ..core.positions import centred
from ..core.retrieval import Neighbours
from .continuous import ContinuousMemory
from .eviction import EVICTIONS, Change, evicted, faded, share
from .file import Savable
from .knn import KNNMemory
from .lock import ReadWriteLock, exclusive, shared
from .rows import listed, present_tokens
from .state import UNALTERED, counts, pack, rebuilt, required


class HybridMemory(Savable):
    """A KNNMemory whose evicted tokens flow into a ContinuousMemory of their keys and values.

    Parameters
    ----------
    rows, heads, dim : int
        As of KNNMemory.
    capacity : int
        Tokens held exactly per row.
    value_dim : int, optional
        Width of a value; `dim` by default.
    slots : int
        At how many places of its signal a read looks at the continuous part.
    eviction : {"fifo", "least_attended"}
        Which tokens leave when a row is full: the oldest, or, among the older half, those that reads attended least.
    contraction : float, optional
        Of the continuous part, for a write of `segment` tokens.
    segment : int
        Tokens for which `contraction` holds.
    dtype : {"float32", "float16", "float64"}
        What exact keys and values are stored as.
    **settings
        `settings` are passed on to the ContinuousMemory: basis, ridge, sticky, samples, seed and so on; not `compat`,
        whose 128 bins are not the `slots`.

    Raises
    ------
    ArgumentError
        A size below 1, an unknown choice, or `compat`.

    Notes
    -----
    Bytes: those of both memories, constant once a row is full. The places of the signal stand for many tokens each: a
    read adds the logarithm of how many to their scores. One softmax then covers the k exact tokens nearest to a query
    and, smoothed, every token that has left; exact tokens beyond the k nearest have no part in it, so that only a k of
    at least `capacity` covers all that was ever written. The attention that falls on the signal decides what its next
    write keeps (sticky), and the attention that falls on tokens what leaves ("least_attended").
    A write costs O(n) and a continuous write of what leaves; with "least_attended" also O(capacity) for the copy.
    Sources: Memorizing Transformers (arXiv 2203.08913), section 3; ∞-former (arXiv 2109.00301), section 3. Neither
    combines the two.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> memory = perdure.HybridMemory(rows=1, heads=1, dim=2, capacity=100, basis=32)
    >>> memory.write(np.ones((1, 1, 1000, 2)), np.ones((1, 1, 1000, 2)))
    >>> memory.tokens
    array([1000])
    >>> memory.read(np.ones((1, 1, 1, 2)), k=8).output.round(2)
    array([[[[1., 1.]]]])
    """

    _kind = "HybridMemory"

    def __init__(
        self,
        rows: int,
        heads: int,
        dim: int,
        capacity: int,
        *,
        value_dim: int | None = None,
        slots: int = 256,
        eviction: str = "fifo",
        contraction: float = 0.75,
        segment: int = 512,
        dtype: str = "float32",
        **settings: Any,
    ):
        dtype = checks.choice("dtype", dtype, ("float32", "float16", "float64"))
        self.recent = KNNMemory(rows, heads, dim, capacity, value_dim=value_dim, dtype=dtype)
        self._lock = ReadWriteLock()
        self.rows, self.heads, self.dim, self.value_dim = rows, heads, dim, self.recent.value_dim
        self.capacity, self.slots = capacity, checks.count("slots", slots)
        self.eviction = checks.choice("eviction", eviction, EVICTIONS)
        if settings.get("compat") is not None:
            raise ArgumentError("compat", "None in a HybridMemory", repr(settings["compat"]), "Use a ContinuousMemory.")
        width = heads * (dim + self.value_dim)
        self.older = ContinuousMemory(rows, width, contraction=contraction, segment=segment, **settings)
        self._used = [np.zeros(0) for _ in range(rows)]  # attention each exact token drew, the oldest first
        self._looked = np.zeros((rows, self.slots))  # attention that fell on each place of the signal since its write
        # by row: the signal as `read` looks at it
        self._places: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.written = np.zeros(rows, np.int64)  # tokens in each row's whole history

    @property
    def tokens(self) -> np.ndarray:
        """Tokens remembered, exactly or in the signal, int64 (rows,)."""
        return self.recent.tokens + self.older.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of both memories and of the attention noted."""
        return self.recent.nbytes + self.older.nbytes + self._looked.nbytes + sum(u.nbytes for u in self._used)

    @exclusive
    def write(self, keys: Any, values: Any, rows: Sequence[int] | None = None, mask: Any = None) -> None:
        """Append a segment; what no longer fits leaves for the signal.

        Parameters
        ----------
        keys : array (rows, heads, n, dim)
        values : array (rows, heads, n, value_dim)
        rows : sequence of int, optional
            Which rows the first axis stands for, each at most once; all by default.
        mask : bool array (rows, n), optional
            False is padding, and not stored.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError
            In every case nothing has been written.
        """
        chosen = listed(rows, self.rows)
        checks.floating_arrays(keys=keys, values=values)
        checks.shape("keys", keys, len(chosen), self.heads, "n", self.dim, whole=True)
        checks.shape("values", values, len(chosen), self.heads, keys.shape[2], self.value_dim, whole=True)
        checks.measurable(keys=keys, values=values)
        present = present_tokens(mask, (len(chosen), int(keys.shape[2])))
        keys, values = to_numpy(keys), to_numpy(values)
        self.recent._encoded(keys, values)  # what cannot be stored, now or once it leaves, is refused before any change
        for i in range(len(chosen)):
            checks.measurable(keys_and_values=self._joined(keys[i], values[i]))
        changes = [self._change(row, keys[i][:, present[i]], values[i][:, present[i]]) for i, row in enumerate(chosen)]
        self._release([change for change in changes if len(change.out)])  # may fail, before any row has changed
        for change in changes:
            if change.anew:
                self.recent.clear([change.row])
            new_keys, new_values, tags = (array[None] for array in (change.keys, change.values, change.tags))
            self.recent.write(new_keys, new_values, rows=[change.row], tags=tags)
            self._used[change.row] = change.used
        self.written[chosen] += present.sum(axis=1)

    def _change(self, row: int, keys: np.ndarray, values: np.ndarray) -> Change:
        """What appending keys (heads, n, dim) and values (heads, n, value_dim) to one row comes to."""
        store, n = self.recent._rows[row], keys.shape[1]
        positions = np.arange(self.written[row], self.written[row] + n)
        leaving = max(store.stored + n - self.capacity, 0)
        used = faded(self._used[row], n)
        order = np.arange(store.oldest, store.written) % store.capacity  # slots, the oldest first
        if not leaving or (self.eviction == "fifo" and leaving <= store.stored):
            gone = np.arange(leaving)
            old_keys, old_values = (store.numbers(name, np.s_[:, order[:leaving]]) for name in ("keys", "values"))
            out = self._joined(old_keys, old_values)
            return Change(row, keys, values, positions, False, np.delete(used, gone), out)
        pairs = (("keys", keys), ("values", values))
        all_keys, all_values = (
            np.concatenate([store.numbers(name, np.s_[:, order]), new], axis=1) for name, new in pairs
        )
        tags = np.concatenate([store.arrays["tags"][0, order] if store.stored else order, positions])
        gone = evicted(used, leaving, self.eviction)
        kept = np.delete(np.arange(used.size), gone)
        out = self._joined(all_keys[:, gone], all_values[:, gone])
        return Change(row, all_keys[:, kept], all_values[:, kept], tags[kept], True, used[kept], out)

    def _release(self, changes: list[Change]) -> None:
        """Let what leaves flow into the signals of all rows at once: all of it, or nothing where that fails."""
        if not changes:
            return
        rows, lengths = [change.row for change in changes], np.array([len(change.out) for change in changes])
        out = np.zeros((len(rows), lengths.max(), self.older.dim), self.older.dtype)
        for i, change in enumerate(changes):
            out[i, : lengths[i]] = change.out
        mask = np.arange(out.shape[1]) < lengths[:, None]
        self.older.write(out, attention=self._looked[rows], rows=rows, mask=mask)
        self._looked[rows] = 0
        for row in rows:
            self._places.pop(row, None)

    def _joined(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Keys and values of all heads side by side: one vector a token, (n, width)."""
        with np.errstate(over="ignore"):  # what overflows is found by the check before any change
            pairs = np.concatenate([keys, values], axis=2).astype(self.older.dtype)  # (heads, n, dim + value_dim)
        return np.moveaxis(pairs, 0, 1).reshape(keys.shape[1], pairs.shape[0] * pairs.shape[2])

    @exclusive
    def read(self, queries: Any, k: int = 32, scale: float | None = None, rows: Sequence[int] | None = None) -> Reading:
        """Attention over the k nearest exact tokens and all places of the signal, in one softmax.

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
            output (rows, query_heads, q, value_dim), lse (rows, query_heads, q), and as `neighbours` the exact tokens
            found, at their positions in the row's whole history.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError

        Notes
        -----
        Where attention fell is noted, for the next write.
        """
        scale = 1 / math.sqrt(self.dim) if scale is None else checks.number("scale", scale)
        chosen = listed(rows, self.rows)
        if not chosen:
            return self._nothing(queries, k)
        near = self.recent.read(queries, k, scale, chosen)
        found = cast(Neighbours, near.neighbours)  # a KNNMemory always says what it found
        dtype = self.recent.computing
        asked = to_numpy(queries).astype(dtype).reshape(self._grouped(queries))  # (rows, heads, g q, d)
        near_lse = to_numpy(near.lse).reshape(asked.shape[:3])
        scores, positions = (to_numpy(a).reshape(*asked.shape[:3], k) for a in (found.scores, found.positions))
        outputs, lses = np.zeros((*asked.shape[:3], self.value_dim), dtype), np.empty(asked.shape[:3], dtype)
        for i, row in enumerate(chosen):
            keys, values, logs = self._sampled(row, dtype)
            energies = scale * (asked[i] @ np.swapaxes(keys, -1, -2)) + logs  # (heads, g q, slots)
            weights, lses[i] = masked_softmax(energies, np.isfinite(energies))
            outputs[i] = weights @ values
            whole = np.logaddexp(near_lse[i], lses[i])
            self._looked[row] += np.sum(weights * share(lses[i], whole)[..., None], axis=(0, 1))
            held = positions[i] >= 0
            drawn = share(scores[i] * scale, whole[..., None])[held]
            np.add.at(self._used[row], positions[i][held] - self.recent._rows[row].oldest, drawn)
        shape = tuple(queries.shape[:3])
        far = Reading(
            like(outputs.reshape(*shape, self.value_dim), queries), like(lses.reshape(shape), queries, near.lse.dtype)
        )
        both = merge(near, far)
        tags = found.positions if found.tags is None else found.tags
        return Reading(both.output, both.lse, Neighbours(found.scores, tags))

    def _grouped(self, queries: Any) -> tuple[int, int, int, int]:
        """The shape of queries (rows, query_heads, q, dim) by the head they read."""
        rows, query_heads, q, dim = queries.shape
        return rows, self.heads, query_heads // self.heads * q, dim

    def _nothing(self, queries: Any, k: int) -> Reading:
        """The reading of no rows."""
        checks.neighbours(k, self.capacity)
        checks.floating_arrays(queries=queries)
        checks.shape("queries", queries, 0, "query_heads", "q", self.dim, whole=True)
        lead, wide = tuple(queries.shape[:3]), computing_dtype(queries)
        output, lse = like(np.zeros((*lead, self.value_dim)), queries), like(np.zeros(lead), queries, wide)
        scores, positions = like(np.zeros((*lead, k)), queries), like(np.zeros((*lead, k), np.int64), queries)
        return Reading(output, lse, Neighbours(scores, positions))

    def _sampled(self, row: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys (heads, slots, dim), values (heads, slots, value_dim), and the logarithm of the tokens of each slot."""
        if row not in self._places:
            samples = self.older.signal(centred(self.slots).astype(self.older.dtype))[row]
            pairs = np.moveaxis(samples.reshape(self.slots, self.heads, -1), 1, 0).astype(dtype)
            tokens = np.diff(self.older.shown(np.arange(self.slots + 1) / self.slots, [row])[0])
            with np.errstate(divide="ignore"):
                logs = np.log(tokens).astype(dtype)
            self._places[row] = pairs[..., : self.dim], pairs[..., self.dim :], logs
        return self._places[row]

    @exclusive
    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows`, or in all of them.

        Raises
        ------
        ArgumentError
        """
        chosen = listed(rows, self.rows)
        self.recent.clear(chosen)
        self.older.clear(chosen)
        for row in chosen:
            self._used[row] = np.zeros(0)
            self._places.pop(row, None)
        self._looked[chosen], self.written[chosen] = 0, 0

    @shared
    def state_dict(self) -> dict[str, np.ndarray]:
        """Both memories and the attention noted, as a flat dict of arrays; "config" holds the rest as JSON bytes."""
        names = ("rows", "heads", "dim", "capacity", "value_dim", "slots", "eviction")
        arrays = {f"recent.{name}": array for name, array in self.recent.state_dict().items()}
        arrays |= {f"older.{name}": array for name, array in self.older.state_dict().items()}
        arrays |= {f"used.{row}": used.copy() for row, used in enumerate(self._used)}
        arrays |= {"looked": self._looked.copy(), "written": self.written.copy()}
        return pack(self._kind, {name: getattr(self, name) for name in names}, arrays)

    @classmethod
    def _restored(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        parts = {
            part: {name.partition(".")[2]: arrays[name] for name in arrays if name.startswith(f"{part}.")}
            for part in ("recent", "older")
        }
        memory = rebuilt(cls, config, basis=1)
        memory.recent = KNNMemory.from_state_dict(parts["recent"])
        memory.older = ContinuousMemory.from_state_dict(parts["older"])
        memory._hold_the_same()
        memory._looked = required(arrays, "looked", (memory.rows, memory.slots), np.float64)
        memory.written = counts(arrays, "written", memory.rows)
        for row, tokens in enumerate(memory.recent.tokens):
            memory._used[row] = required(arrays, f"used.{row}", (int(tokens),), np.float64)
        return memory

    def _hold_the_same(self) -> None:
        """Both parts are of the sizes that the whole is.

        Raises
        ------
        ArgumentError
        """
        recent, older = self.recent, self.older
        width = self.heads * (self.dim + self.value_dim)
        wanted = self.rows, self.heads, self.dim, self.value_dim, self.capacity, self.rows, width
        came = recent.rows, recent.heads, recent.dim, recent.value_dim, recent.capacity, older.rows, older.dim
        if came != wanted:
            raise ArgumentError("state", f"two memories of sizes {wanted}", str(came), UNALTERED)
