"""The signals of all rows of a ContinuousMemory, and what a write of segments of any lengths makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends.arrays import framework, namespace
from ..backends.devices import Host, Place
from ..backends.exchange import like, to_numpy
from ..backends.parcels import Parcel, send
from ..core import original
from ..core.consolidation import Scheme, fitted, updated, updated_in_bins
from ..core.positions import resample
from .rows import detached, taken
from .sticky import drawn_bins
from .timeline import Kept, Timeline

NOTHING = 1e-12  # of the room: what a write leaves at least, for a 0 could not be divided by


class Signals:
    """Coefficients (rows, N, dim), tokens written, and which token each place shows.

    The coefficients live at `place`; where that is None, in the framework and on the device of what was last appended.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        dtype: str,
        scheme: Scheme,
        contraction: float,
        segment: int | None,
        rng: np.random.Generator,
        place: Host | Place | None,
    ):
        self.scheme, self.dtype, self.rng = scheme, dtype, rng
        self.contraction, self.segment = contraction, segment
        self.coefficients: Any = np.zeros((rows, len(scheme.basis), dim), dtype)
        self.written = np.zeros(rows, np.int64)
        self.timeline = Timeline(rows)
        self.move(place)

    def move(self, place: Host | Place | None) -> None:
        """Let the coefficients live at `place` from now on.

        Raises
        ------
        DeviceMemoryError
        """
        if place is not None:
            with place.watched():
                self.coefficients = place.take(self.coefficients)
        self.place = place

    def here(self, array: Any) -> Any:
        """`array` at the place; itself, with its graph, where it is there or may stay, and where it is no array."""
        if self.place is None or framework(array) is None:
            return array
        at_home = framework(array) == framework(self.coefficients) and array.device == self.coefficients.device
        return array if at_home else self.place.take(array)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "coefficients": detached(self.coefficients)}  # a graph can be neither copied nor saved

    def contraction_of(self, length: int) -> float:
        """What a write of `length` tokens leaves of the room to the old signal."""
        return max(self.contraction ** (1 if self.segment is None else length / self.segment), NOTHING)

    def beside(self, x: Any, keep_graph: bool = False) -> Any:
        """The coefficients in the framework and on the device of x."""
        B = self.coefficients if keep_graph else detached(self.coefficients)
        if framework(B) == framework(x) and B.device == x.device:
            return B
        return like(to_numpy(B), x, getattr(namespace(x), self.dtype))

    def append(self, x: Any, present: np.ndarray, chosen: list[int], histogram: Any, draws: np.ndarray | None) -> None:
        """Put the tokens of x (chosen, n, dim) that are `present` behind the signals of the rows `chosen`.

        Rows of equally many tokens are computed together. Nothing changes until all is computed.
        """
        old, xp, rows = self.beside(x), namespace(x), self.written.size
        if framework(histogram) not in (None, "numpy") and (
            framework(histogram) != framework(x) or histogram.device != x.device
        ):
            histogram = to_numpy(histogram)  # of queries elsewhere
        changed: dict[int, Any] = {}
        moves: list[tuple[int, Kept | None, int]] = []
        lengths = present.sum(axis=1)
        kinds = list(zip((self.written[chosen] == 0).tolist(), lengths.tolist(), strict=True))
        whole = self.coefficients
        for fresh, length in sorted(set(kinds)):
            if length == 0:
                continue
            group = [i for i, kind in enumerate(kinds) if kind == (fresh, length)]
            new, of = taken(x, group, present), [chosen[i] for i in group]
            if fresh:
                made = fitted(self.scheme, new)
                moves += [(row, None, length) for row in of]
            else:
                of_group = (None if a is None else a[group] for a in (histogram, draws))
                made, where = self._contracted(taken(old, of), new, *of_group)
                moves += [(row, Kept(where, j), length) for j, row in enumerate(of)]
            changed |= {row: made[j, ...] for j, row in enumerate(of)}
            whole = made if of == list(range(rows)) else None
        if changed and whole is None:
            whole = xp.stack([changed.get(r, old[r, ...]) for r in range(rows)])
        self.coefficients = whole
        for row, at, length in moves:
            if at is None:
                self.timeline.start(row, length)
            else:
                self.timeline.contract(row, self.contraction_of(length), at, length)
        self.written[chosen] += lengths

    def _contracted(self, B: Any, x: Any, histogram: Any, draws: np.ndarray | None) -> tuple[Any, np.ndarray | Parcel]:
        """Coefficients (group, N, dim) after a write of x (group, n, dim) to B, and which positions of B were kept."""
        scheme, contraction = self.scheme, self.contraction_of(x.shape[1])
        if scheme.original and draws is None and histogram is not None:
            draws = drawn_bins(to_numpy(histogram), scheme.samples, self.rng)
        if draws is not None:
            counts = original.counts_of_draws(draws)
            made = updated_in_bins(scheme, B, x, contraction, original.left_edges(), counts)
            return made, np.sort(draws, axis=1) / original.BINS
        if histogram is None:
            evenly = scheme.old_positions(contraction)[None].repeat(x.shape[0], axis=0)
            return updated(scheme, B, x, contraction), evenly
        where = resample(histogram, scheme.looks(contraction), self.rng)
        made = updated(scheme, B, x, contraction, where)
        return made, where if isinstance(where, np.ndarray) else send(where)  # the timeline can wait for it

    def clear(self, chosen: list[int]) -> None:
        """Forget the rows `chosen`."""
        B = detached(self.coefficients)
        kept = np.ones((self.written.size, 1, 1), bool)
        kept[chosen] = False
        xp = namespace(B)
        self.coefficients = xp.where(like(kept, B), B, xp.zeros_like(B))
        self.written[chosen] = 0
        self.timeline.tokens[chosen] = 0
