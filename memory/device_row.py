"""One row's (key, value) pairs on a device: a ring of the newest, and older ones in main memory where asked for.

The device's arrays are of the array-API standard: what holds on a GPU runs, and is checked, on any device that speaks
it. What the ring has no more room for moves into a `Row` in main memory; a search asks both.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.arrays import cast, name_of, namespace
from ..backends.devices import Place, memory_of
from ..backends.errors import ArgumentError
from ..backends.exchange import to_numpy
from ..backends.parcels import send
from ..core.attention import attention, gather
from ..core.retrieval import better, retrieve
from ..core.stored import decode, retrieve_stored
from .indexes.exact import ExactIndex
from .overflow import Chunk, Overflow
from .row import SMALLEST, Row
from .storage import COARSEST, DTYPES, LEVELS, RAW, computing

WIDE = ("float32", "float64")  # stored as what is computed with
STORED_AS = {name: name for name in DTYPES} | {"bfloat16": "int16"}  # its bits: the array API has no bfloat16


def check(place: Place, index: str, dtype: str) -> None:
    """The choices of a memory at `place` are those that there are on a device.

    Raises
    ------
    ArgumentError
    """
    if index not in ("exact", "auto"):  # the one there is, which "auto" then takes
        raise ArgumentError("index", '"exact" on a device', repr(index), 'Pass index="exact", or device="cpu".')
    bits = dtype != "bfloat16" or hasattr(place.empty((0,), place.xp.float32), "view")
    if not bits or not hasattr(place.xp, STORED_AS[dtype]):
        raise ArgumentError("dtype", f"one that {place.device} computes with", repr(dtype), 'Pass dtype="float32".')


class DeviceRow:
    """What `Row` does, with arrays at `place`; the token at position p stands in slot p % ring.

    Parameters
    ----------
    place : Place
    ring : int
        The most tokens held there; `capacity` - `ring` older ones are held in main memory.
    """

    def __init__(
        self, place: Place, ring: int, heads: int, dim: int, value_dim: int, capacity: int, dtype: str, space: str
    ):
        self.place, self.ring, self.capacity, self.dtype, self.space = place, ring, capacity, dtype, space
        self.sizes = {"keys": (heads, dim), "values": (heads, value_dim)}
        self.written = 0  # tokens in the row's whole history
        self.arrays: dict[str, Any] = {}
        self.arrays = self._allocated(0, False)
        index = ExactIndex(heads, dim, space, np.dtype(RAW[dtype]))
        rest = capacity - ring
        self.older = Overflow(Row(heads, dim, value_dim, rest, dtype, index)) if rest else None

    # ---- how much there is ------------------------------------------------------------------------------------------

    @property
    def stored(self) -> int:
        """Tokens held now, main memory included."""
        return min(self.written, self.capacity)

    @property
    def here(self) -> int:
        """Tokens in the ring."""
        return min(self.written, self.ring)

    @property
    def oldest(self) -> int:
        """Position of the oldest token in the ring."""
        return self.written - self.here

    @property
    def slots(self) -> int:
        """Slots of the ring that are allocated."""
        return self.arrays["keys"].shape[1]

    @property
    def nbytes(self) -> int:
        device = sum(math.prod(a.shape) * np.dtype(name_of(a.dtype)).itemsize for a in self.arrays.values())
        return device + (0 if self.older is None else self.older.nbytes)

    @property
    def index(self) -> Any:
        """For `explain`."""
        return _Explained(self)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _allocated(self, slots: int, tagged: bool) -> dict[str, Any]:
        """Arrays of `slots` with what is held copied into them."""
        xp, made = self.place.xp, {}
        for name, (heads, width) in self.sizes.items():
            made[name] = self.place.empty((heads, slots, width), getattr(xp, STORED_AS[self.dtype]))
            if self.dtype == "int8":
                made[f"{name}_scales"] = self.place.empty((heads, slots), xp.float32)
        if tagged or "tags" in self.arrays:
            with memory_of(self.place.device):
                made["tags"] = xp.full((1, slots), -1, dtype=xp.int64, device=self.place.device)
        for name, array in self.arrays.items():
            made[name][:, : self.here, ...] = array[:, : self.here, ...]
        return made

    def prepare(self, parts: dict[str, Any], tags: np.ndarray | None) -> Prepared:
        """All of a write of `parts` (heads, n, ...), encoded, at the place, and tags (n,), that can fail.

        Nothing has changed yet: arrays are allocated, and what leaves the ring is on its way to main memory.
        """
        n, arrays = parts["keys"].shape[1], self.arrays
        needed, slots = min(self.written + n, self.ring), self.slots
        if needed > slots:
            slots = min(max(needed, 2 * slots, SMALLEST), self.ring)
        if slots > self.slots or (tags is not None and "tags" not in arrays):
            arrays = self._allocated(slots, tags is not None)
        if "tags" in arrays:
            given = np.full((1, n), -1, np.int64) if tags is None else tags[None]
            parts = {**parts, "tags": self.place.take(given)}
        return Prepared(n, arrays, parts, self._leaving(arrays, parts, n))

    def _leaving(self, arrays: dict[str, Any], parts: dict[str, Any], n: int) -> list[Chunk]:
        """What leaves the ring when n come; more than the ring holds passes through at once."""
        first, last = self.oldest, max(self.written + n - self.ring, self.oldest)
        if self.older is None:
            return []
        self.older.reserve(last - first, "tags" in arrays)
        chunks = [
            self.older.packed({name: a[:, slots, ...] for name, a in arrays.items()})
            for slots, _ in _ranges(first, min(last, self.written), self.ring)
        ]  # copies, so that the ring may be written over before they have arrived
        if last > self.written:
            passing = {name: part[:, : last - self.written, ...] for name, part in parts.items()}
            chunks.append(self.older.packed(passing))
        return chunks

    def accept(self, prepared: Prepared) -> None:
        """Append what `prepare` made of a write."""
        n, self.arrays = prepared.tokens, prepared.arrays
        if self.older is not None:
            self.older.push(prepared.leaving)
        kept = min(n, self.ring)
        for slots, taken in _ranges(self.written + n - kept, self.written + n, self.ring):
            for name, part in prepared.parts.items():
                self.arrays[name][:, slots, ...] = part[:, n - kept + taken.start : n - kept + taken.stop, ...]
        self.written += n

    # ---- reading ----------------------------------------------------------------------------------------------------

    def stored_here(self, name: str) -> tuple[Any, Any]:
        """The ring's keys or values as they are stored, and their scales or None; float16 as bits, as bfloat16 is."""
        array, scales = self.arrays[name][:, : self.here, ...], self.arrays.get(f"{name}_scales")
        return bits(array), None if scales is None else scales[:, : self.here]

    def search(self, queries: Any, k: int) -> tuple[Any, Any]:
        """Scores and positions in the whole history, (heads, q, k), of the k best for `queries` (heads, q, dim)."""
        with memory_of(self.place.device):
            start, held = self.oldest % self.ring, self.older is not None and self.older.stored
            asked = send(queries) if held else None  # so that both sides search at once
            scores, ages = self._search_here(queries, k, start)
            here = scores, namespace(scores).where(ages >= 0, ages + self.oldest, -1)
            if self.older is None or asked is None:
                return here
            scores, positions = self.older.row.search(asked.take(), k)
            return better(here, (self.place.take(scores), self.place.take(positions)), k)

    def _search_here(self, queries: Any, k: int, start: int) -> tuple[Any, Any]:
        """Scores and ages (heads, q, k) of the best in the ring, whose oldest stands in slot `start`."""
        keys, scales = self.stored_here("keys")
        if self.dtype in WIDE:
            return retrieve(queries, keys, k, self.space, None, start)
        return retrieve_stored(queries, keys, scales, self.dtype, k, self.space, start)

    def attend(self, queries: Any, positions: Any, scale: float, products: Any = None) -> tuple[Any, Any]:
        """Output (heads, q, value_dim) and lse (heads, q) of attention over the tokens at `positions` (heads, q, k).

        `products` that are known are computed again, in the one pass that a GPU makes over keys and values.
        """
        xp = namespace(queries)
        if self.stored == 0:
            shape = (*positions.shape[:2], self.sizes["values"][1])
            nothing = xp.zeros(shape, dtype=queries.dtype, device=queries.device)
            return nothing, xp.sum(nothing, axis=-1) - np.inf
        with memory_of(self.place.device):
            if self.dtype in WIDE and (self.older is None or not self.older.stored):
                ages = xp.where(positions >= 0, positions - self.oldest, -1)
                pairs = self.stored_here("keys")[0], self.stored_here("values")[0]
                return attention(queries, *pairs, ages, scale, None, self.oldest % self.ring)
            taken, found = self.gather(positions), (positions >= 0)[..., None, :]
            output, lse = attention(queries[..., None, :], taken["keys"], taken["values"], None, scale, found, 0)
        return output[..., 0, :], lse[..., 0]

    def gather(self, positions: Any) -> dict[str, Any]:
        """Keys, values and tags at `positions` (heads, q, k); zeros, and tag -1, where the position is -1."""
        taken = self._gather_here(self.place.xp.where(positions >= self.oldest, positions, -1))
        if self.older is not None and self.older.stored:
            numbers = to_numpy(positions)
            others = self.older.row.gather(np.where(numbers < self.oldest, numbers, -1))
            for name in ("keys", "values"):
                taken[name] = taken[name] + self.place.take(others[name])
            if others["tags"] is not None and taken["tags"] is not None:
                xp = namespace(positions)
                taken["tags"] = xp.where(positions >= self.oldest, taken["tags"], self.place.take(others["tags"]))
        return taken

    def _gather_here(self, positions: Any) -> dict[str, Any]:
        xp, found = namespace(positions), positions >= 0
        taken: dict[str, Any] = {"tags": None}
        if "tags" in self.arrays:
            taken["tags"] = xp.full(positions.shape, -1, dtype=xp.int64, device=positions.device)
        if not self.here:
            kind = getattr(xp, computing(self.dtype).name)
            for name, (_, width) in self.sizes.items():
                taken[name] = xp.zeros((*positions.shape, width), dtype=kind, device=positions.device)
            return taken
        slots = xp.where(found, positions % self.ring, 0)
        entries = {name: gather(a if a.ndim == 3 else a[..., None], slots) for name, a in self.arrays.items()}
        for name in ("keys", "values"):
            scales = entries.get(f"{name}_scales")
            numbers = decode(bits(entries[name]), None if scales is None else scales[..., 0], self.dtype)
            taken[name] = xp.where(found[..., None], numbers, xp.zeros_like(numbers))
        if "tags" in entries:
            taken["tags"] = xp.where(found, entries["tags"][..., 0], -1)
        return taken

    def tags_at(self, positions: Any) -> Any:
        """Tags at `positions` (heads, q, k), -1 where the position is -1; None where no tags are kept."""
        return self.gather(positions)["tags"] if "tags" in self.arrays else None

    # ---- to and from main memory ------------------------------------------------------------------------------------

    def saved(self) -> dict[str, np.ndarray]:
        """The row's arrays as `Row` would hold them: the token at position p in slot p % capacity, (heads, stored)."""
        out: dict[str, np.ndarray] = {}
        at = np.arange(self.written - self.stored, self.written)
        for name, array in self.arrays.items():
            ring = as_stored(name, array, self.dtype)
            whole = np.empty((ring.shape[0], self.stored, *ring.shape[2:]), ring.dtype)
            newest = at[at >= self.oldest]
            whole[:, newest % self.capacity] = ring[:, newest % self.ring]
            if self.older is not None and self.older.stored:
                old = at[at < self.oldest]
                there = self.older.row
                whole[:, old % self.capacity] = there.arrays[name][:, old % there.capacity]
            out[name] = whole
        return out

    @classmethod
    def of(cls, row: Row, place: Place, ring: int, space: str) -> DeviceRow:
        """What `row` holds, at `place`."""
        (heads, _, dim), (_, _, value_dim) = (row.arrays[name].shape for name in ("keys", "values"))
        made = cls(place, ring, heads, dim, value_dim, row.capacity, row.dtype, space)
        made.written = row.written
        slots = min(max(made.here, SMALLEST), ring)
        newest, older = np.arange(made.oldest, made.written), np.arange(row.oldest, made.oldest)
        beyond = None if made.older is None else made.older.row
        if beyond is not None:
            beyond.written = made.oldest
        for name, array in row.arrays.items():
            part = np.zeros((array.shape[0], slots, *array.shape[2:]), array.dtype)
            part[:, newest % ring] = array[:, newest % row.capacity]
            bits = part.view(np.int16) if part.dtype == np.uint16 else part
            with memory_of(place.device):
                made.arrays[name] = place.xp.asarray(bits, device=place.device)
            if beyond is not None:
                part = np.empty((array.shape[0], older.size, *array.shape[2:]), array.dtype)
                part[:, older % beyond.capacity] = array[:, older % row.capacity]
                beyond.arrays[name] = part
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceRow:
        made = copy.copy(self)
        made.arrays = {n: namespace(a).asarray(a, copy=True) for n, a in self.arrays.items()}
        made.older = copy.deepcopy(self.older, memo)
        return made


@dataclass(frozen=True)
class Prepared:
    """A write that can no longer fail: tokens, the ring's arrays, what goes into them, and what leaves them."""

    tokens: int
    arrays: dict[str, Any]
    parts: dict[str, Any]
    leaving: list[Chunk]


class _Explained:
    """How a row is searched, in words."""

    nbytes = 0

    def __init__(self, row: DeviceRow):
        self.row = row

    def explain(self) -> str:
        older = "" if self.row.older is None else f", {self.row.older.stored} more in main memory"
        return f"every key is scored, {self.row.here} of them on {self.row.place.device}{older}"


def encode(name: str, numbers: Any, dtype: str) -> dict[str, Any]:
    """`storage.encode` for arrays of any framework: vectors (..., d) as they are stored."""
    xp = namespace(numbers)
    if dtype == "bfloat16":  # the upper half of float32, rounded to nearest, ties to even
        bits = numbers.view(xp.int32)
        return {name: cast((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16, xp.int16)}
    if dtype != "int8":
        return {name: cast(numbers, getattr(xp, dtype))}
    scales = xp.clip(xp.max(xp.abs(numbers), axis=-1) / LEVELS, None, float(COARSEST))
    steps = xp.where(scales > 0, scales, xp.ones_like(scales))[..., None]
    codes = xp.clip(xp.round(numbers / steps), -LEVELS, LEVELS)
    return {name: cast(codes, xp.int8), f"{name}_scales": scales}


def bits(stored: Any) -> Any:
    """`stored`, with float16 given by its bits, as bfloat16 is: what is computed with never widens all of it."""
    return stored.view(namespace(stored).int16) if name_of(stored.dtype) == "float16" else stored


def widened(stored: Any) -> Any:
    """What halves of either kind stand for."""
    return decode(bits(stored), None, "float16" if name_of(stored.dtype) == "float16" else "bfloat16")


def as_stored(name: str, array: Any, dtype: str) -> np.ndarray:
    """The row's array `name` as NumPy, as `storage` has it."""
    numbers = to_numpy(array).astype(name_of(array.dtype), copy=False)
    return numbers.view(np.uint16) if dtype == "bfloat16" and name in ("keys", "values") else numbers


def _ranges(first: int, last: int, ring: int) -> list[tuple[slice, slice]]:
    """Slots of the positions first <= p < last, at most `ring` of them, and which these are: one or two ranges."""
    ranges, at = [], first
    while at < last:
        count = min(last - at, ring - at % ring)
        ranges.append((slice(at % ring, at % ring + count), slice(at - first, at - first + count)))
        at += count
    return ranges
