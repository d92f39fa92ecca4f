"""The memory of Memorizing Transformers: the newest (key, value) pairs of every row, written, cleared and kept."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from ..backends.arrays import namespace
from ..backends.devices import HOST, Place, place_of
from ..backends.errors import ArgumentError
from ..backends.exchange import like
from ..core import checks
from ..core.retrieval import SPACES
from . import device_row, storage
from .device_row import DeviceRow
from .file import Savable
from .indexes import make_index
from .indexes.costs import Costs
from .lock import ReadWriteLock
from .retrieving import Retrieving
from .row import Row
from .rows import listed, token_array
from .state import counts, pack, rebuilt, required_finite
from .storage import DTYPES

INDEXES = ("exact", "ivf", "hnsw", "auto")
SELECTIONS = ("best", "bucketed")
CONFIG = (
    *("rows", "heads", "dim", "capacity", "value_dim", "space", "dtype"),
    *("index", "target_recall", "max_norm", "seed", "selection", "costs"),
)  # the arguments that a state holds


class KNNMemory(Retrieving, Savable):
    """Bounded memory of (key, value) pairs per row and head, read by attention over the k nearest keys.

    Parameters
    ----------
    rows : int
        Documents, users or batch elements; none ever sees another's pairs.
    heads, dim : int
        Heads a row has, and the width of a key.
    capacity : int
        The most tokens held per row; the oldest leave first.
    value_dim : int, optional
        Width of a value; `dim` by default.
    space : {"ip", "cosine", "l2"}
        What "nearest" means; see `top_k`. Attention scores are scale·q·k in every space.
    dtype : {"float32", "float16", "bfloat16", "int8", "float64"}
        What keys and values are stored as; int8 has a scale a vector. Computed with, queries included, is float32, or
        float64 where that is stored. No originals are kept beside: search is exact for the keys as stored.
    index : {"exact", "ivf", "hnsw", "auto"}
        How the nearest are found: all keys scored; inverted lists that follow the stream; graphs over its older part
        (needs hnswlib); or whichever of these its use so far makes cheapest. See `explain`.
    target_recall : float
        Share of the true neighbours that approximate indexes are tuned to find, as audits on the memory's own queries
        measure it. A RecallWarning says once that it is out of reach.
    max_norm : float, optional
        Longer keys are shortened to this norm when written. Under "ip" one key of a large norm can draw most of the
        attention of every query; this bounds what it can draw.
    seed : int
        Of the random choices of approximate indexes.
    device : "cpu", "cuda", "cuda:N", or a framework's device object; optional
        Where keys and values live and are searched, exactly: on a GPU with CuPy, or else PyTorch. A state saved there
        loads anywhere; `to` moves a memory.
    device_capacity : int, optional
        The most tokens of a row on the device, where that is less than `capacity`: older ones are kept, and searched,
        in main memory.
    selection : {"best", "bucketed"}
        "bucketed" takes the best key of each of k buckets of slots, as the authors' code does, in place of the k best:
        for comparison with that code only.
    costs : dict of str to float, optional
        What a step costs here, for "auto"; see `Costs`. By default measured once on each machine, and kept.

    Raises
    ------
    ArgumentError
        A size below 1, or so large that nothing could be stored; an unknown choice.
    BackendError
        A device that is not there, or cannot compute; DeviceMemoryError where it is full.

    Notes
    -----
    Bytes: rows x heads x min(tokens, capacity) x (dim + value_dim) x itemsize, allocated as tokens come (doubling), and
    what the index keeps beside: for float32 keys dim + 12 a key as codes,
    or the keys once more. A write costs O(n), a read O(q n d), over as many threads as there are.
    Source: Wu et al., "Memorizing Transformers" (ICLR 2022, arXiv 2203.08913), section 3. Differs from the paper in
    that a row with nothing stored reads as nothing (output 0, lse -inf), where the authors' code attends to slots of
    zeros.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> rng = np.random.default_rng(0)
    >>> memory = perdure.KNNMemory(rows=1, heads=2, dim=8, capacity=100)
    >>> keys = rng.standard_normal((1, 2, 250, 8))
    >>> memory.write(keys, values=keys)
    >>> memory.tokens
    array([100])
    >>> reading = memory.read(keys[:, :, -1:], k=4)
    >>> reading.neighbours.positions[0, 0, 0, 0] >= 150  # the oldest 150 have left
    np.True_
    """

    _kind = "KNNMemory"

    def __init__(
        self,
        rows: int,
        heads: int,
        dim: int,
        capacity: int,
        *,
        value_dim: int | None = None,
        space: str = "ip",
        dtype: str = "float32",
        index: str = "exact",
        target_recall: float = 0.95,
        max_norm: float | None = None,
        seed: int = 0,
        device: Any = None,
        device_capacity: int | None = None,
        selection: str = "best",
        costs: Mapping[str, float] | None = None,
    ):
        self.rows, self.heads = checks.count("rows", rows), checks.count("heads", heads)
        self.dim = checks.count("dim", dim)
        self.capacity = checks.count("capacity", capacity, most=np.iinfo(np.int64).max)  # positions are int64
        self.value_dim = self.dim if value_dim is None else checks.count("value_dim", value_dim)
        checks.addressable(rows=self.rows, heads=self.heads, dim=self.dim)
        checks.addressable(rows=self.rows, heads=self.heads, value_dim=self.value_dim)
        self.space, self.dtype = checks.choice("space", space, SPACES), checks.choice("dtype", dtype, DTYPES)
        self.index = checks.choice("index", index, INDEXES)
        self.max_norm = None if max_norm is None else checks.positive("max_norm", max_norm)
        tiny, largest = float(np.finfo(self.computing).tiny), float(np.finfo(self.computing).max)
        if self.max_norm is not None and not tiny <= self.max_norm <= largest:
            expected = f"a norm from {tiny:.3g} to {largest:.3g}, the range of {self.computing}"
            raise ArgumentError("max_norm", expected, repr(max_norm), "Leave it out, or pass max_norm=1.0.")
        self.target_recall, self.seed = checks.positive("target_recall", target_recall), checks.count("seed", seed, 0)
        if self.target_recall > 1:
            raise ArgumentError("target_recall", "at most 1", repr(target_recall), "Pass target_recall=0.95.")
        self.selection = checks.choice("selection", selection, SELECTIONS)
        if self.selection != "best" and self.index != "exact":
            raise ArgumentError("selection", "'best' with this index", repr(selection), "Pass index='exact'.")
        self.costs = None if costs is None else Costs.given(costs).constants()
        self._place, self._ring = place_of(device), self.capacity
        if device_capacity is not None:
            self._ring = min(checks.count("device_capacity", device_capacity), self.capacity)
        if isinstance(self._place, Place):
            device_row.check(self._place, self.index, self.dtype)
        self._rows: list[Any] = [self._empty() for _ in range(self.rows)]
        self._lock = ReadWriteLock()

    def _empty(self) -> Row | DeviceRow:
        if isinstance(self._place, Place):
            sizes = self.heads, self.dim, self.value_dim, self.capacity
            return DeviceRow(self._place, self._ring, *sizes, self.dtype, self.space)
        name = self.index if self.selection == "best" else self.selection
        kind = (name, self.heads, self.dim, self.space, self.dtype, self.capacity, self.target_recall, self.seed)
        index = make_index(*kind, None if self.costs is None else Costs.given(self.costs))
        return Row(self.heads, self.dim, self.value_dim, self.capacity, self.dtype, index)

    @property
    def device(self) -> Any:
        """Where keys and values live: "cpu" for main memory, else the device's own object."""
        return self._place.device if isinstance(self._place, Place) else "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values, tags and what the index keeps beside them."""
        return sum(row.nbytes for row in self._rows)

    def write(
        self, keys: Any, values: Any, rows: Sequence[int] | None = None, mask: Any = None, tags: Any = None
    ) -> None:
        """Append a segment; where a row is full, its oldest tokens leave.

        Parameters
        ----------
        keys : array (rows, heads, n, dim)
            Any n, none and more than the capacity included.
        values : array (rows, heads, n, value_dim)
        rows : sequence of int, optional
            Which rows the first axis stands for, each at most once; all by default.
        mask : bool array (rows, n), optional
            False is padding: not stored, and no place in the history. Its numbers have to be finite all the same.
        tags : int array (rows, n) or int, optional
            One integer a token, given back with every neighbour; tokens without one have -1.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError
            In every case nothing has been written.

        Notes
        -----
        Cost O(rows heads n (dim + value_dim)). No gradient is kept.
        """
        chosen = listed(rows, self.rows)
        checks.floating_arrays(keys=keys, values=values)
        checks.shape("keys", keys, len(chosen), self.heads, "n", self.dim, whole=True)
        checks.shape("values", values, len(chosen), self.heads, keys.shape[2], self.value_dim, whole=True)
        tokens = (len(chosen), keys.shape[2])
        with self._place.watched():
            parts = self._encoded(self._numbers(keys), self._numbers(values))
        present = None if mask is None else token_array("mask", mask, tokens, "bool")
        if tags is not None:
            tags = np.full(tokens, tags) if isinstance(tags, int | np.integer) else tags
            tags = token_array("tags", tags, tokens, "integral")
            if tags.dtype == np.uint64:
                checks.within("tags", tags, 0, np.iinfo(np.int64).max)
            tags = tags.astype(np.int64)
        with self._lock.writing:
            prepared = []
            for i, row in enumerate(chosen):  # whatever fails, fails here, where no row has changed
                own, own_tags = {name: part[i, ...] for name, part in parts.items()}, None if tags is None else tags[i]
                with self._place.watched():
                    if present is not None and not present[i].all():
                        kept = np.flatnonzero(present[i])
                        own = {name: namespace(a).take(a, like(kept, a), axis=1) for name, a in own.items()}
                        own_tags = None if own_tags is None else own_tags[kept]
                    prepared.append(self._rows[row].prepare(own, own_tags))
            for row, ready in zip(chosen, prepared, strict=True):
                self._rows[row].accept(ready)

    def _encoded(self, keys: Any, values: Any) -> dict[str, Any]:
        """Keys and values as they are stored, checked before, and where the dtype may overflow, after."""
        checks.measurable(keys=keys)
        checks.finite(values=values)
        if self.index == "hnsw" and self.dtype == "float64":  # graphs are made in float32
            checks.measurable(keys=storage.cast_silently(keys, np.float32))
        if self.max_norm is not None:
            xp = namespace(keys)
            norms = xp.sqrt(xp.sum(keys * keys, axis=-1, keepdims=True))
            keys = keys * (self.max_norm / xp.clip(norms, self.max_norm, None))
        codec: Any = storage if self._place is HOST else device_row
        parts = {**codec.encode("keys", keys, self.dtype), **codec.encode("values", values, self.dtype)}
        if self.dtype in ("float16", "bfloat16"):
            for name in ("keys", "values"):
                checks.finite(**{name: codec.widened(parts[name])})
        return parts

    def explain(self) -> str:
        """Of every row: what is stored, how it is searched and why, and the bytes that takes."""
        return "\n".join(
            f"row {i}: {row.stored} of {self.capacity} tokens, {self.dtype}; {row.index.explain()}; "
            f"{row.nbytes} bytes, {row.index.nbytes} of them for the index"
            for i, row in enumerate(self._rows)
        )

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows` (all by default), in O(1): their stores are dropped, and history restarts at 0.

        Raises
        ------
        ArgumentError
            A row out of range; then nothing has been forgotten.
        """
        chosen = listed(rows, self.rows)
        with self._lock.writing:
            for row in chosen:
                self._rows[row] = self._empty()

    def select(self, rows: Sequence[int]) -> Self:
        """A memory of its own with copies of `rows`, in this order; a row may come more than once (beam search).

        Raises
        ------
        ArgumentError
            A row out of range, or none at all.
        """
        chosen = [listed([row], self.rows)[0] for row in rows]
        checks.count("rows", len(chosen))
        made = type(self).__new__(type(self))
        made.__dict__ |= {**self.__dict__, "rows": len(chosen), "_lock": ReadWriteLock()}
        with self._lock.reading:
            made._rows = [copy.deepcopy(self._rows[row]) for row in chosen]
        return made

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything stored, as a flat dict of arrays; "config" holds the constructor's arguments as JSON bytes."""
        with self._unchanged() as state:
            return {name: array.copy() for name, array in state.items()}

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[dict[str, np.ndarray]]:
        """The state as it lies in memory: who writes has to wait until the block ends."""
        with self._lock.reading:
            arrays = {"written": self._each("written")}
            for i, row in enumerate(self._rows):
                arrays |= {f"rows.{i}.{name}": a for name, a in row.saved().items()}
                if isinstance(row, Row):
                    arrays |= {f"rows.{i}.index.{name}": a for name, a in row.index.state().items()}
            yield pack(self._kind, {name: getattr(self, name) for name in CONFIG}, arrays)

    @classmethod
    def _restored(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        memory = rebuilt(cls, config, device=None, device_capacity=None)  # of which a state says nothing
        written = counts(arrays, "written", memory.rows)
        for i, row in enumerate(memory._rows):
            row.reserve(0, f"rows.{i}.tags" in arrays)
            row.written = int(written[i])
            for name, empty in row.arrays.items():
                shape = (empty.shape[0], row.stored, *empty.shape[2:])
                row.arrays[name] = required_finite(arrays, f"rows.{i}.{name}", shape, empty.dtype)
            learned = f"rows.{i}.index."
            row.index.restore({n.removeprefix(learned): a for n, a in arrays.items() if n.startswith(learned)})
        return memory

    def to(self, device: Any, device_capacity: int | None = None) -> Self:
        """A memory of its own with what this one holds, on `device`; arguments and errors are the constructor's.

        Parameters
        ----------
        device : "cpu", "cuda", "cuda:N", or a framework's device object
        device_capacity : int, optional
        """
        made = self.from_state_dict(self.state_dict())
        place, ring = place_of(device), self.capacity
        if device_capacity is not None:
            ring = min(checks.count("device_capacity", device_capacity), self.capacity)
        if isinstance(place, Place):
            device_row.check(place, self.index, self.dtype)
            made._place, made._ring = place, ring
            made._rows = [DeviceRow.of(row, place, ring, self.space) for row in made._rows]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.from_state_dict(self.state_dict()) if self._place is HOST else self.select(range(self.rows))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles, as to worker processes, go through the state, so that no lock or index travels."""
        return type(self).from_state_dict, (self.state_dict(),)
