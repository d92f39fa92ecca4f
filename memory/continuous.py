"""The ∞-former's memory: any number of tokens in N coefficients a row, older ones more and more compressed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from ..backends.arrays import computing_dtype, framework, namespace
from ..backends.devices import HOST, place_of
from ..backends.errors import ArgumentError, ShapeError
from ..backends.exchange import like, to_numpy
from ..backends.parcels import Parcel, send
from ..core import checks, original
from ..core.attention import Reading
from ..core.basis import Basis, gaussian_basis, positions_in
from ..core.consolidation import Scheme, fitted, updated, updated_in_bins
from ..core.density import DENSITIES, expected_value
from ..core.positions import fraction, resample
from ..core.report import SignalReport, signal_report, smallest_scheme
from ..core.signal import Signal, penalty
from .file import Savable
from .lock import ReadWriteLock
from .rows import detached, listed, segment, taken
from .state import counts, pack, rebuilt, required, unpack
from .sticky import bins_drawn, drawn_bins, generator, histogram_of, resumed
from .timeline import KNOTS, Kept, Timeline

DTYPES = ("float32", "float64")
COMPATIBLE = ("infinite-former",)
SEGMENT = 512  # tokens a report supposes a write to bring, until one has


class ContinuousMemory(Savable):
    """Unbounded memory of fixed size: a signal x(t) on [0, 1] a row, contracted whenever new tokens come.

    Parameters
    ----------
    rows : int
        Documents, users or batch elements; none ever sees another's signal.
    dim : int
        Width of a token's vector.
    basis : int or Basis
        How many Gaussians, or which functions.
    contraction : float
        tau in (0, 1): what a write leaves of the room to the old signal.
    ridge : float
        Relative penalty of every fit; at least 1e-4 keeps the condition below 1 + N/ridge.
    sticky : bool
        Whether writes keep more of the old signal where attention fell.
    samples : int
        M: at how many positions a write looks at the old signal.
    segment : int, optional
        Tokens for which `contraction` holds: a write of n contracts by contraction^(n/segment), so that time passes
        by the token, however many come at once. None: every write contracts alike, as in the paper.
    density : {"truncated_gaussian", "gaussian", "sparsemax", "biweight"}
        Where a read looks, unless it says otherwise.
    bins : int
        D: bins of the attention histogram.
    dtype : {"float32", "float64"}
        Of the coefficients.
    compat : {"infinite-former"}, optional
        Reproduce the authors' code: padding, positions, `ridge` as lambda itself, plain Gaussian, 128 bins, draws with
        replacement at left edges.
    seed : int or numpy.random.Generator
        Of the sticky positions. A PCG64 generator may be shared between memories; its state is saved.
    device : "cpu", "cuda", "cuda:N", or a framework's device object; optional
        Where the coefficients live and are computed with, whatever is written; see KNNMemory.

    Raises
    ------
    BackendError
        A device that is not there, or cannot compute; DeviceMemoryError where it is full.
    ArgumentError
        A size below 1, an unknown choice, contraction outside (0, 1), or a negative ridge.

    Notes
    -----
    Bytes: rows x N x dim x itemsize, and nothing a token. Without `device` the coefficients live in the framework and
    on the device of what was last written; with it, gradients reach only an x that comes from there. A write costs
    O(N² dim + N n dim) at most, a read O(q N dim); the factorisations are made once for a length and shared through a
    bounded cache.
    Source: Martins et al., "∞-former: Infinite Memory Transformer" (ACL 2022, arXiv 2109.00301), section 3. Differs
    from the paper in that samples stand at midpoints, no zeros are fitted outside [0, 1], the penalty is relative, the
    density is cut to [0, 1], and sticky positions are drawn systematically inside the bins.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> memory = perdure.ContinuousMemory(rows=1, dim=4, basis=64)
    >>> for _ in range(100):
    ...     memory.write(np.ones((1, 256, 4)))
    >>> memory.tokens, memory.nbytes
    (array([25600]), 1024)
    >>> bool(abs(memory.signal([0.7])[0, 0, 0] - 1) < 0.01)
    True
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        basis: int | Basis = 512,
        contraction: float = 0.5,
        ridge: float = 1e-3,
        sticky: bool = True,
        samples: int = 512,
        *,
        segment: int | None = None,
        density: str = "truncated_gaussian",
        bins: int = original.BINS,
        dtype: str = "float32",
        compat: str | None = None,
        seed: int | np.random.Generator = 0,
        device: Any = None,
    ):
        self.rows, self.dim = checks.count("rows", rows), checks.count("dim", dim)
        self.basis = basis if isinstance(basis, Basis) else gaussian_basis(checks.count("basis", basis))
        self.contraction, self.sticky = fraction("contraction", contraction), bool(sticky)
        self.segment = None if segment is None else checks.count("segment", segment)
        self.density, self.bins = checks.choice("density", density, DENSITIES), checks.count("bins", bins)
        self.dtype = checks.choice("dtype", dtype, DTYPES)
        self.compat = None if compat is None else checks.choice("compat", compat, COMPATIBLE)
        if self.compat:
            self.density, self.bins = "gaussian", original.BINS
        self.scheme = Scheme(self.basis, penalty(ridge), checks.count("samples", samples), self.compat is not None)
        self._rng = generator(seed)
        self._lock = ReadWriteLock()
        self._written = np.zeros(self.rows, np.int64)
        self._timeline = Timeline(self.rows)
        self._last_segment = self.segment or SEGMENT
        self._coefficients: Any = np.zeros((self.rows, len(self.basis), self.dim), self.dtype)
        self._place = None if device is None else place_of(device)
        self._settle_in()

    @classmethod
    def for_horizon(
        cls,
        tokens: int,
        error: float = 0.3,
        *,
        rows: int,
        dim: int,
        segment: int = 512,
        features: int | None = None,
        most: int = 2048,
        **settings: Any,
    ) -> Self:
        """The smallest memory that still recalls what came `tokens` ago with at most that predicted relative error.

        Parameters
        ----------
        tokens : int
            How far back.
        error : float
            In (0, 1).
        rows, dim : int
        segment : int
            Tokens a write brings.
        features : int, optional
            How many independent features a segment carries; segment/16 by default.
        most : int
            Largest N tried.
        **settings
            `settings` are passed on to the constructor.

        Returns
        -------
        ContinuousMemory
            With N a power of two, widths scaled to it, and the contraction that predicts the least error.

        Raises
        ------
        ArgumentError
            No N up to `most` reaches it; the message names the best error there.
        """
        length = checks.count("segment", segment)
        features = checks.count("features", max(length // 16, 1) if features is None else features)
        ridge = penalty(settings.pop("ridge", 1e-3))
        scheme, contraction = smallest_scheme(
            checks.count("tokens", tokens),
            fraction("error", error),
            ridge,
            length,
            features,
            checks.count("most", most),
        )
        n, samples = len(scheme.basis), scheme.samples
        return cls(rows, dim, n, contraction, ridge, samples=samples, segment=length, **settings)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens written since the row was last cleared, int64 (rows,)."""
        return self._written.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the coefficients."""
        return self.rows * len(self.basis) * self.dim * np.dtype(self.dtype).itemsize

    @property
    def device(self) -> Any:
        """Where the coefficients live: "cpu" for NumPy's, else the device's own object."""
        return getattr(self._coefficients, "device", "cpu")

    @property
    def signal(self) -> Signal:
        """What is remembered, with leading axis (rows,); rows that nothing was written to are zero."""
        B, scheme = self._coefficients, self.scheme
        return Signal(B, self.basis, scheme.ridge, B.dtype, self._last_segment, scheme.original)

    def write(
        self, x: Any, attention: Any = None, rows: Sequence[int] | None = None, mask: Any = None, draws: Any = None
    ) -> None:
        """Contract what is remembered and put new tokens after it.

        Parameters
        ----------
        x : array (rows, n, dim)
            Any n; a row's first write fills all of its signal.
        attention : (mean, variance) or array (rows, D), optional
            Where reads looked since the last write: the densities of the last read, (rows, ..., q) each, or a
            histogram over D equal bins. Without it, or where it is zero, the old signal is kept evenly.
        rows : sequence of int, optional
            Which rows the first axis stands for, each at most once; all by default.
        mask : bool array (rows, n), optional
            False is padding, and not written. A row with nothing to write is left as it is.
        draws : integer array (rows, M), optional
            With compat: the bins to keep, in place of drawing them.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError
            In every case nothing has been written.

        Notes
        -----
        Gradients reach x through the newest segment only; what is remembered is detached.
        """
        with HOST.watched() if self._place is None else self._place.watched():
            self._write(self._here(x), attention, rows, mask, draws)

    def _write(self, x: Any, attention: Any, rows: Sequence[int] | None, mask: Any, draws: Any) -> None:
        chosen = listed(rows, self.rows)
        x, present = segment(x, len(chosen), self.dim, mask, self.dtype)
        histogram = None
        if self.sticky and attention is not None:
            edges = original.edges() if self.compat else np.arange(self.bins + 1) / self.bins
            histogram = histogram_of(attention, len(chosen), edges, self.density, exact=self.compat is not None)
        if draws is not None:
            if not self.compat:
                raise ArgumentError("draws", "None without compat", "an array", "Pass compat='infinite-former'.")
            draws = bins_drawn("draws", draws, (len(chosen), self.scheme.samples), self.bins)
        old = self._beside(x)
        changed: dict[int, Any] = {}
        moves: list[tuple[int, Any, int]] = []
        lengths = present.sum(axis=1)
        kinds = list(zip((self._written[chosen] == 0).tolist(), lengths.tolist(), strict=True))
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
            if of == list(range(self.rows)):
                whole = made
                break
            changed |= {row: made[j, ...] for j, row in enumerate(of)}
        else:
            xp, whole = namespace(old), self._coefficients
            if changed:
                whole = xp.stack([changed.get(r, old[r, ...]) for r in range(self.rows)])
        with self._lock.writing:
            self._coefficients = whole
            for row, at, length in moves:
                if at is None:
                    self._timeline.start(row, length)
                else:
                    self._timeline.contract(row, self._contraction(length), at, length)
            self._written[chosen] += lengths
            self._last_segment = int(lengths.max(initial=0)) or self._last_segment

    def _contracted(self, B: Any, x: Any, histogram: Any, draws: np.ndarray | None) -> tuple[Any, np.ndarray | Parcel]:
        """Coefficients (group, N, dim) after a write of x (group, n, dim) to B, and which positions of B were kept."""
        contraction = self._contraction(x.shape[1])
        if self.compat and draws is None and histogram is not None:
            draws = drawn_bins(histogram, self.scheme.samples, self._rng)
        if draws is not None:
            counts = original.counts_of_draws(draws)
            made = updated_in_bins(self.scheme, B, x, contraction, original.left_edges(), counts)
            return made, np.sort(draws, axis=1) / self.bins
        if histogram is None:
            evenly = np.broadcast_to(self.scheme.old_positions(), (x.shape[0], self.scheme.samples))
            return updated(self.scheme, B, x, contraction), evenly
        where = resample(histogram, self.scheme.samples, self._rng)
        made = updated(self.scheme, B, x, contraction, where)
        return made, where if isinstance(where, np.ndarray) else send(where)  # the timeline can wait for it

    def _contraction(self, length: int) -> float:
        return self.contraction ** (1 if self.segment is None else length / self.segment)

    def read(self, mean: Any, variance: Any, density: str | None = None, rows: Sequence[int] | None = None) -> Reading:
        """What queries see that look at the memory through a density each.

        Parameters
        ----------
        mean : array (rows, ..., q)
            Where each looks, in [0, 1]: 0 the oldest, 1 the newest.
        variance : array (rows, ..., q), or a number for all
        density : {"truncated_gaussian", "gaussian", "sparsemax", "biweight"}, optional
            The memory's own by default.
        rows : sequence of int, optional
            Which rows the first axis stands for; all by default.

        Returns
        -------
        Reading
            output (rows, ..., q, dim) in the dtype of `mean`; lse (rows, ..., q), the logarithm of the mass: 0, or -inf
            with output 0 in rows that nothing was written to.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError
        """
        reading = self._read(self._here(mean), self._here(variance), density, rows)
        if self._place is None or self._here(mean) is mean:
            return reading
        lse = self._place.give(reading.lse, mean, computing_dtype(mean))
        return Reading(self._place.give(reading.output, mean), lse)

    def _read(self, mean: Any, variance: Any, density: str | None, rows: Sequence[int] | None) -> Reading:
        chosen = listed(rows, self.rows)
        checks.floating_arrays(mean=mean)
        checks.shape("mean", mean, len(chosen), *"q" * max(mean.ndim - 1, 1))
        xp, shape = namespace(mean), tuple(mean.shape)
        if framework(variance) is None:
            variance = like(checks.plain("variance", variance), mean, computing_dtype(mean))
        checks.floating_arrays(mean=mean, variance=variance)
        if checks.leading(mean=(mean, 0), variance=(variance, 0)) != shape:
            raise ShapeError("variance", f"what broadcasts to {shape}", str(tuple(variance.shape)), "Reshape it.")
        flat = (shape[0], math.prod(shape[1:]))
        mean, variance = xp.reshape(mean, flat), xp.reshape(xp.broadcast_to(variance, shape), flat)
        with self._lock.reading:
            B, written = taken(self._beside(mean, keep_graph=True), chosen), self._written[chosen]
        signal = Signal(B, self.basis, self.scheme.ridge, mean.dtype, self._last_segment, self.scheme.original)
        output = expected_value(signal, mean, variance, density or self.density)
        empty = like(np.where(written > 0, 0.0, -np.inf), mean, computing_dtype(mean))
        lse = xp.broadcast_to(xp.reshape(empty, (shape[0],) + (1,) * (len(shape) - 1)), shape)
        return Reading(xp.reshape(output, (*shape, self.dim)), lse)

    def shown(self, t: Any, rows: Sequence[int] | None = None) -> np.ndarray:
        """Which token of its history a row shows at each place, by how many came before it.

        Parameters
        ----------
        t : array (T,), or plain numbers
            Places in [0, 1].
        rows : sequence of int, optional
            Which rows; all by default.

        Returns
        -------
        float64 array (rows, T)
            Ascending along t where t ascends; where it climbs steeply, many tokens share little room.

        Raises
        ------
        ArgumentError, NonFiniteError, DTypeError
        """
        chosen, t = listed(rows, self.rows), checks.plain("t", t)
        checks.shape("t", t, "T", whole=True)
        return self._timeline.at(positions_in("t", t, t=t), chosen)

    def report(self, segment: int | None = None, features: int | None = None) -> SignalReport:
        """What this memory can hold, segments of `segment` tokens with `features` each; see Signal.report.

        Raises
        ------
        ArgumentError
        """
        length = self._last_segment if segment is None else checks.count("segment", segment)
        return signal_report(self.scheme, length, self._contraction(length), features)

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows`, or in all of them.

        Raises
        ------
        ArgumentError
            A row out of range; then nothing has been forgotten.
        """
        chosen = listed(rows, self.rows)
        B = detached(self._coefficients)
        kept = np.ones((self.rows, 1, 1), bool)
        kept[chosen] = False
        xp = namespace(B)
        with self._lock.writing:
            self._coefficients = xp.where(like(kept, B), B, xp.zeros_like(B))
            self._written[chosen] = 0
            self._timeline.tokens[chosen] = 0

    def state_dict(self) -> dict[str, np.ndarray]:
        """Coefficients, counts and basis as a flat dict of arrays; "config" holds the rest as JSON bytes."""
        names = ("rows", "dim", "contraction", "sticky", "segment", "density", "bins", "dtype", "compat")
        config = {name: getattr(self, name) for name in names}
        config |= {"ridge": self.scheme.ridge, "samples": self.scheme.samples, "kind_of_basis": self.basis.kind}
        with self._lock.reading:
            config |= {"generator": self._rng.bit_generator.state, "last_segment": self._last_segment}
            B = np.array(to_numpy(detached(self._coefficients)))
            arrays = {"coefficients": B, "written": self.tokens, "shown": self._timeline.tokens.copy()}
        arrays |= {"centers": self.basis.centers.copy(), "widths": self.basis.widths.copy()}
        return pack("ContinuousMemory", config, arrays)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The memory that `state` describes; its behaviour is bit-identical from here on.

        Raises
        ------
        ArgumentError
            No state of a ContinuousMemory, or an altered one.
        """
        config, arrays = unpack("ContinuousMemory", state)
        generator, last, kind = (config.pop(name, None) for name in ("generator", "last_segment", "kind_of_basis"))
        centers, widths = (required(arrays, name, (None,), np.float64) for name in ("centers", "widths"))
        basis = Basis(centers, widths, kind)
        memory = rebuilt(cls, config, basis=basis)
        memory._rng = resumed(generator)
        memory._last_segment = checks.count("last_segment", last)
        shape = (memory.rows, len(basis), memory.dim)
        memory._coefficients = required(arrays, "coefficients", shape, np.dtype(memory.dtype))
        memory._written = counts(arrays, "written", memory.rows)
        memory._timeline.tokens = required(arrays, "shown", (memory.rows, KNOTS), np.float64)
        checks.finite(**{"state['coefficients']": memory._coefficients, "state['shown']": memory._timeline.tokens})
        return memory

    def to(self, device: Any, device_capacity: None = None) -> Self:
        """A memory of its own with what this one holds, on `device`; arguments and errors are the constructor's.

        Parameters
        ----------
        device : "cpu", "cuda", "cuda:N", or a framework's device object
        device_capacity : None
            For kinds of memory that hold tokens.
        """
        if device_capacity is not None:
            raise ArgumentError(
                "device_capacity", "None for a continuous memory", repr(device_capacity), "Leave it out."
            )
        made, made_place = self.from_state_dict(self.state_dict()), place_of(device)
        made._place = made_place
        made._settle_in()
        return made

    def _settle_in(self) -> None:
        """Bring the coefficients to where they shall live."""
        if self._place is not None:
            with self._place.watched():
                self._coefficients = self._place.take(self._coefficients)

    def _here(self, array: Any) -> Any:
        """`array` where the coefficients shall live; itself, with its graph, where it is there or may stay."""
        if self._place is None or framework(array) is None:
            return array
        at_home = framework(array) == framework(self._coefficients) and array.device == self._coefficients.device
        return array if at_home else self._place.take(array)

    def _beside(self, x: Any, keep_graph: bool = False) -> Any:
        """The coefficients in the framework and on the device of x."""
        B = self._coefficients if keep_graph else detached(self._coefficients)
        if framework(B) == framework(x) and B.device == x.device:
            return B
        return like(to_numpy(B), x, self._dtype_beside(x))

    def _dtype_beside(self, x: Any) -> Any:
        return getattr(namespace(x), self.dtype)
