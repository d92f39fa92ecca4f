"""What stands between a caller and a stored memory: keys of a common length, and no source that fills it alone."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import numpy as np

from ..backends.errors import QuotaError
from .kinds import revive
from .protocol import Memory
from .rows import listed

KEYS = {"knn": "keys", "hybrid": "keys"}  # which argument of `write` is clipped
SETTLING = 256  # tokens of a row whose median is its first measure of a key's length
INERTIA = 65_536  # tokens after which the measure moves no slower
MOST_SOURCES = 65_536
OBJECTS = 1024  # bytes of Python's objects, and of a record's head, for a memory (twice that), a row, and a source


class Guard:
    """A memory behind its guard: the same calls in the same order leave the same state, whoever repeats them.

    A key is clipped to `clip` times the ordinary length of its row and head: the median of the first 256 tokens, from
    then on a running mean in which no token counts as longer than `clip` times, or shorter than 1/`clip` times, what is
    ordinary; keys of length 0 do not count. One row's keys never touch another's measure. Clipping bounds what long
    keys can do to a softmax; a key of ordinary length that lies in the direction of the queries keeps its effect.
    """

    def __init__(
        self,
        memory: Memory,
        state: dict[str, np.ndarray],
        kind: str,
        clip: float | None,
        source_quota: int | None,
    ):
        self.memory, self.clip, self.source_quota = memory, clip or math.inf, source_quota
        self.keys = KEYS.get(kind, "") if clip is not None else ""  # which argument is clipped, if any
        rows, heads = getattr(memory, "rows", 0), getattr(memory, "heads", 0)
        self.counts = np.zeros(rows, np.int64)  # tokens seen
        self.lengths = np.zeros((rows, heads))  # what is ordinary
        self.first = np.zeros((rows, heads, SETTLING if self.keys else 0), np.float32)
        self.sources: dict[str, int] = {}
        self._signature = inspect.signature(memory.write)
        own = self.counts.nbytes + self.lengths.nbytes + self.first.nbytes + OBJECTS * (2 + rows)
        self._beside = max(sum(array.nbytes for array in state.values()) - memory.nbytes, 0) + own

    @property
    def nbytes(self) -> int:
        """Bytes in main memory, and the most that the state takes on the disk."""
        return self.memory.nbytes + self._beside + OBJECTS * len(self.sources)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of `write` by name.

        Raises
        ------
        TypeError
            They do not fit the memory's `write`.
        ArgumentError
            Rows that are none.
        """
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        if arguments.get("rows") is not None:
            arguments["rows"] = listed(arguments["rows"], len(self.counts))
        return arguments

    def growth(self, arguments: dict[str, Any], record: int) -> int:
        """The most bytes by which the state grows with this call, which takes `record` bytes as it comes."""
        floats = [a.dtype.itemsize for a in arguments.values() if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
        kept = 8 if str(getattr(self.memory, "dtype", "")) == "float64" else 4
        tagged = 8 * int(self.memory.tokens.sum()) if "tags" in arguments else 0
        return record * max(kept // min(floats, default=kept), 1) + 16 * _tokens(arguments) + tagged

    def write(self, arguments: dict[str, Any], source: str | None = None) -> None:
        """The memory's `write`, guarded; a rejected call changes nothing.

        Raises
        ------
        QuotaError
            The source has written its tokens.
        PerdureError
            Whatever the memory raises.
        """
        tokens = self._counted(arguments, source)
        measured = self._measured(arguments) if self.keys else None
        if measured is None:
            self.memory.write(**arguments)
        else:
            chosen, keys, *after = measured
            self.memory.write(**(arguments | {self.keys: keys}))
            self.counts[chosen], self.lengths[chosen], self.first[chosen] = after
        if source is not None:
            self.sources[source] = tokens

    def clear(self, rows: Any = None) -> None:
        """The memory's `clear`; what was ordinary in the rows is forgotten too, and with all rows, the sources."""
        self.memory.clear(rows)
        chosen = slice(None) if rows is None else list(rows)
        self.counts[chosen] = self.lengths[chosen] = self.first[chosen] = 0
        if rows is None:
            self.sources.clear()

    def state(self) -> dict[str, np.ndarray]:
        """The memory's state_dict and the guard's own state beside it."""
        own = {"counts": self.counts, "lengths": self.lengths, "first": self.first}
        own["sources"] = np.frombuffer(json.dumps(self.sources).encode(), np.uint8)
        return {**self.memory.state_dict(), **{f"guard.{name}": array.copy() for name, array in own.items()}}

    @classmethod
    def revive(cls, state: dict[str, np.ndarray], kind: str, clip: float | None, source_quota: int | None) -> Guard:
        """The guard and the memory whose `state` it was.

        Raises
        ------
        ArgumentError, ValueError, KeyError
            Not such a state.
        """
        own = {name: array for name, array in state.items() if name.startswith("guard.")}
        state = {name: array for name, array in state.items() if name not in own}
        memory = revive(state)
        guard = cls(memory, state, kind, clip, source_quota)
        for name in ("counts", "lengths", "first"):
            getattr(guard, name)[...] = own[f"guard.{name}"]
        guard.sources = json.loads(own["guard.sources"].tobytes())
        return guard

    def _counted(self, arguments: dict[str, Any], source: str | None) -> int:
        """Tokens the source will have written after this call."""
        if source is None:
            return 0
        tokens = self.sources.get(source, 0) + _tokens(arguments)
        if self.source_quota is not None and tokens > self.source_quota:
            raise QuotaError(
                "source",
                f"at most {self.source_quota} tokens from one source",
                f"{tokens} from {source!r}",
                "Clear the memory, or raise its source_quota.",
            )
        if source not in self.sources and len(self.sources) >= MOST_SOURCES:
            raise QuotaError("source", f"at most {MOST_SOURCES} sources", "another", "Clear the memory, or name fewer.")
        return tokens

    def _measured(self, arguments: dict[str, Any]) -> tuple[Any, ...] | None:
        """Rows, clipped keys, and what counts, lengths and first become; None where the memory will refuse the call."""
        keys, rows, mask = arguments.get(self.keys), arguments.get("rows"), arguments.get("mask")
        chosen = list(range(len(self.counts))) if rows is None else list(rows)
        if not isinstance(keys, np.ndarray) or keys.ndim != 4 or keys.dtype.kind != "f":
            return None
        if keys.shape[:2] != (len(chosen), self.lengths.shape[1]):
            return None
        tokens = (len(chosen), keys.shape[2])
        mask = np.ones(tokens, bool) if mask is None else mask
        known = all(isinstance(row, int) and 0 <= row < len(self.counts) for row in chosen)
        if not known or not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != tokens:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            wide = keys.astype(np.float64, copy=False)
            norms = np.sqrt(np.einsum("rhnd,rhnd->rhn", wide, wide))
        if not np.isfinite(norms).all():
            return None
        counts, lengths, first = self.counts[chosen], self.lengths[chosen], self.first[chosen]
        for i in range(len(chosen)):
            new = norms[i][:, mask[i]]
            lengths[i] = self._ordinary(int(counts[i]), lengths[i], first[i], new)
            counts[i] += new.shape[1]
        most = (self.clip * lengths)[..., None]
        long = (norms > most) & (most > 0)
        if long.any():
            shrink = np.divide(most, norms, out=np.ones_like(norms), where=long)
            keys = keys * shrink[..., None].astype(keys.dtype)
        return chosen, keys, counts, lengths, first

    def _ordinary(self, seen: int, length: np.ndarray, first: np.ndarray, new: np.ndarray) -> np.ndarray:
        """What is ordinary (heads,) once `new` lengths (heads, n) are seen; fills `first`."""
        settling = new[:, : max(SETTLING - seen, 0)]
        if settling.shape[1]:
            first[:, seen : seen + settling.shape[1]] = settling
            length = _medians(first[:, : seen + settling.shape[1]])
        rest = new[:, settling.shape[1] :]
        if not rest.shape[1]:
            return length
        if not length.all():
            length = np.where(length > 0, length, _medians(rest))
        told = (rest > 0).sum(axis=1)
        within = np.clip(rest, length[:, None] / self.clip, length[:, None] * self.clip)
        counted = np.where(rest > 0, within, 0).sum(axis=1) / np.maximum(told, 1)
        weight = told / (min(seen + settling.shape[1], INERTIA) + told)
        return length + weight * (counted - length)


def _medians(lengths: np.ndarray) -> np.ndarray:
    """Of the lengths (heads, n) above 0; 0 where there are none, as for a padding of zeros, which tells nothing."""
    known = [row[row > 0] for row in lengths]
    return np.array([np.median(row) if row.size else 0.0 for row in known], np.float64)


def _tokens(arguments: dict[str, Any]) -> int:
    """Tokens that a call of `write` brings, in all rows together."""
    if isinstance(mask := arguments.get("mask"), np.ndarray):
        return int(np.count_nonzero(mask))
    first = next((a for a in arguments.values() if isinstance(a, np.ndarray)), np.empty((0, 0)))
    return first.shape[0] * first.shape[-2] if first.ndim > 1 else 0
