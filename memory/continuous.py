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
from ..core import checks, original
from ..core.attention import Reading
from ..core.basis import Basis, gaussian_basis
from ..core.consolidation import Scheme
from ..core.density import DENSITIES
from ..core.expectation import expected_value
from ..core.signal import Signal, penalty
from .file import Savable
from .foresight import Foresight
from .lock import ReadWriteLock, exclusive, shared
from .rows import detached, listed, segment, taken
from .signals import Signals
from .state import counts, pack, rebuilt, required
from .sticky import attention_of, bins_drawn, generator, histogram_of, resumed
from .timeline import KNOTS

DTYPES = ("float32", "float64")
COMPATIBLE = ("infinite-former",)
SEGMENT = 512  # tokens a report supposes a write to bring, until one has


class ContinuousMemory(Foresight, Savable):
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
        M: at how many positions a write looks at the old signal; more of them where narrow functions need it.
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
        A size below 1, an unknown choice, contraction outside (0, 1), a negative ridge, or a segment so long that
        contraction^(1/segment) rounds to 1.

    Notes
    -----
    Bytes: rows x N x dim x itemsize, and nothing a token. Without `device` the coefficients live in the framework and
    on the device of what was last written; with it, gradients reach only an x that comes from there. A write costs
    O(N² dim + N n dim) at most, a read O(q N dim); the factorisations are made once for a length and shared through a
    bounded cache.
    Source: Martins et al., "∞-former: Infinite Memory Transformer" (ACL 2022, arXiv 2109.00301), section 3. Differs
    from the paper in that samples stand at midpoints, no zeros are fitted outside [0, 1], the penalty is relative, the
    density is cut to [0, 1], sticky positions are drawn systematically inside the bins, and samples too sparse for the
    functions are made up for, so that no stream makes the signal grow.

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

    _kind = "ContinuousMemory"

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
        self.contraction, self.sticky = checks.number("contraction", contraction, 0, 1), bool(sticky)
        self.segment = None if segment is None else checks.count("segment", segment)
        if self.segment and self.contraction ** (1 / self.segment) == 1:  # nothing would be left for a token
            raise ArgumentError("segment", "a length whose tokens have room", repr(segment), "Pass a shorter segment.")
        self.density, self.bins = checks.choice("density", density, DENSITIES), checks.count("bins", bins)
        self.dtype = checks.choice("dtype", dtype, DTYPES)
        self.compat = None if compat is None else checks.choice("compat", compat, COMPATIBLE)
        if self.compat:
            self.density, self.bins = "gaussian", original.BINS
        self.scheme = Scheme(self.basis, penalty(ridge), checks.count("samples", samples), self.compat is not None)
        self._lock = ReadWriteLock()
        place = None if device is None else place_of(device)
        self._signals = Signals(
            self.rows, self.dim, self.dtype, self.scheme, self.contraction, self.segment, generator(seed), place
        )
        self._last_segment = self.segment or SEGMENT

    @property
    def tokens(self) -> np.ndarray:
        """Tokens written since the row was last cleared, int64 (rows,)."""
        return self._signals.written.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the coefficients."""
        return self.rows * len(self.basis) * self.dim * np.dtype(self.dtype).itemsize

    @property
    def device(self) -> Any:
        """Where the coefficients live: "cpu" for NumPy's, else the device's own object."""
        return getattr(self._signals.coefficients, "device", "cpu")

    @property
    def signal(self) -> Signal:
        """What is remembered, with leading axis (rows,); rows that nothing was written to are zero."""
        return self._signal(self._signals.coefficients)

    def _signal(self, B: Any, dtype: Any = None) -> Signal:
        scheme = self.scheme
        return Signal(
            B, self.basis, scheme.ridge, B.dtype if dtype is None else dtype, self._last_segment, scheme.original
        )

    @exclusive
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
            False is padding, finite, and not written. A row with nothing to write is left as it is.
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
        with (self._signals.place or HOST).watched():
            self._write(self._signals.here(x), attention, rows, mask, draws)

    def _write(self, x: Any, attention: Any, rows: Sequence[int] | None, mask: Any, draws: Any) -> None:
        chosen = listed(rows, self.rows)
        x, present = segment(x, len(chosen), self.dim, mask, self.dtype)
        histogram = None
        if attention is not None:
            attention = attention_of(attention, len(chosen), self.density, self.bins if self.compat else None)
            if self.sticky:
                edges = original.edges() if self.compat else np.arange(self.bins + 1) / self.bins
                histogram = histogram_of(attention, edges, self.density)
        if draws is not None:
            if not self.compat:
                raise ArgumentError("draws", "None without compat", "an array", "Pass compat='infinite-former'.")
            draws = bins_drawn("draws", draws, (len(chosen), self.scheme.samples), self.bins)
        generator = self._signals.rng.bit_generator
        drawn_from = generator.state
        try:
            self._signals.append(x, present, chosen, histogram, draws)
        except BaseException:
            generator.state = drawn_from  # what was drawn for a write that failed is drawn again
            raise
        self._last_segment = int(present.sum(axis=1).max(initial=0)) or self._last_segment

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
        place, here = self._signals.place, self._signals.here
        reading = self._read(here(mean), here(variance), density, rows)
        if place is None or here(mean) is mean:
            return reading
        return Reading(place.give(reading.output, mean), place.give(reading.lse, mean, computing_dtype(mean)))

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
            B, written = taken(self._signals.beside(mean, keep_graph=True), chosen), self._signals.written[chosen]
        output = expected_value(self._signal(B, mean.dtype), mean, variance, density or self.density)
        empty = like(np.where(written > 0, 0.0, -np.inf), mean, computing_dtype(mean))
        lse = xp.broadcast_to(xp.reshape(empty, (shape[0],) + (1,) * (len(shape) - 1)), shape)
        return Reading(xp.reshape(output, (*shape, self.dim)), lse)

    @exclusive
    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows`, or in all of them.

        Raises
        ------
        ArgumentError
            A row out of range; then nothing has been forgotten.
        """
        self._signals.clear(listed(rows, self.rows))

    @shared
    def state_dict(self) -> dict[str, np.ndarray]:
        """Coefficients, counts and basis as a flat dict of arrays; "config" holds the rest as JSON bytes."""
        names = ("rows", "dim", "contraction", "sticky", "segment", "density", "bins", "dtype", "compat")
        config = {name: getattr(self, name) for name in names}
        config |= {"ridge": self.scheme.ridge, "samples": self.scheme.samples, "kind_of_basis": self.basis.kind}
        signals = self._signals
        config |= {"generator": signals.rng.bit_generator.state, "last_segment": self._last_segment}
        B = np.array(to_numpy(detached(signals.coefficients)))
        arrays = {"coefficients": B, "written": self.tokens, "shown": signals.timeline.tokens.copy()}
        arrays |= {"centers": self.basis.centers.copy(), "widths": self.basis.widths.copy()}
        return pack(self._kind, config, arrays)

    @classmethod
    def _restored(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        generator, last, kind = (config.pop(name, None) for name in ("generator", "last_segment", "kind_of_basis"))
        centers, widths = (required(arrays, name, (None,), np.float64) for name in ("centers", "widths"))
        basis = Basis(centers, widths, kind)
        memory = rebuilt(cls, config, basis=basis)
        memory._last_segment = checks.count("last_segment", last)
        signals, shape = memory._signals, (memory.rows, len(basis), memory.dim)
        signals.rng = resumed(generator)
        signals.coefficients = required(arrays, "coefficients", shape, np.dtype(memory.dtype))
        signals.written = counts(arrays, "written", memory.rows)
        signals.timeline.tokens = required(arrays, "shown", (memory.rows, KNOTS), np.float64)
        checks.finite(**{"state['coefficients']": signals.coefficients, "state['shown']": signals.timeline.tokens})
        return memory

    def to(self, device: Any, device_capacity: int | None = None) -> Self:
        """A memory of its own with what this one holds, on `device`; arguments and errors are the constructor's.

        Parameters
        ----------
        device : "cpu", "cuda", "cuda:N", or a framework's device object
        device_capacity : int, optional
            For kinds of memory that hold tokens; here it is refused.
        """
        if device_capacity is not None:
            expected = "None, for there are no tokens to keep elsewhere"
            raise ArgumentError("device_capacity", expected, repr(device_capacity), "Leave it out.")
        place, made = place_of(device), self.from_state_dict(self.state_dict())
        made._signals.move(place)
        return made
