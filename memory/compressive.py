"""The memory of a Compressive Transformer: recent states, and older ones compressed c to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from ..backends.arrays import cast, computing_dtype, namespace
from ..backends.errors import ArgumentError, NonFiniteError, ShapeError
from ..backends.exchange import like as like_of
from ..backends.exchange import to_numpy
from ..core import checks
from ..core.compression import METHODS, checked_weights, compressed, most_used
from .lock import exclusive, shared
from .rows import detached, listed
from .state import pack, rebuilt
from .window import Change
from .windowed import Windowed


class CompressiveMemory(Windowed):
    """The newest `capacity` states of every row, and before them `compressed` summaries of `rate` older states each.

    Parameters
    ----------
    rows : int
        Documents, users or batch elements; none ever sees another's states.
    dim : int
        Width of a state.
    capacity : int
        Recent states held per row. Up to rate - 1 more wait until they are a block.
    compressed : int
        The most compressed states held per row; the oldest are forgotten.
    rate : int
        c: how many states become one.
    method : {"mean", "max", "conv", "dilated", "most_used"}
        How; see `compress`.
    weights : tuple of arrays (...), optional
        Kernel and bias of "conv" or "dilated", of the framework that states come in; `weights` may be set anew.
    dtype : {"float32", "float16", "float64"}
        What states are stored as.

    Raises
    ------
    ArgumentError, ShapeError
        A size below 1, an unknown choice, or weights that the method does not take or that are not finite.

    Notes
    -----
    Bytes: rows x (capacity + rate - 1 + compressed) x dim x itemsize; it spans capacity + rate x compressed tokens.
    States are stored without a graph. Source: Rae et al., "Compressive Transformers" (ICLR 2020, arXiv 1911.05507),
    section 3. Differs from the paper in that nothing is padded or dropped: states wait until they are c.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> memory = perdure.CompressiveMemory(rows=1, dim=1, capacity=2, compressed=3, rate=4, method="mean")
    >>> memory.write(np.arange(11.0).reshape(1, 11, 1))
    >>> memory.read().states.ravel()
    array([ 1.5,  5.5,  8. ,  9. , 10. ], dtype=float32)
    """

    _kind = "CompressiveMemory"

    def __init__(
        self,
        rows: int,
        dim: int,
        capacity: int,
        compressed: int,
        rate: int,
        method: str = "mean",
        *,
        weights: tuple[Any, ...] = (),
        dtype: str = "float32",
    ):
        super().__init__(rows, dim, capacity, dtype)
        self.compressed = checks.count("compressed", compressed)
        self.rate, self.method = checks.count("rate", rate), checks.choice("method", method, METHODS)
        self.weights = self._checked(weights)
        self._older, self._recent = self._window(self.compressed), self._window(self.capacity + self.rate - 1)
        self._windows = {"older": self._older, "recent": self._recent}

    @property
    def tokens(self) -> np.ndarray:
        """Tokens remembered now, the compressed ones counted as `rate` each, int64 (rows,)."""
        return self._recent.stored + self.rate * self._older.stored

    def _append(self, x: Any, present: np.ndarray, chosen: list[int]) -> None:
        weights = self._weights_beside(x)
        recent = self._recent.prepare(x, present, chosen, self.capacity, self.rate)
        blocks = recent.leaving // self.rate
        if blocks.any():  # all that can fail, before any state has changed
            summaries = self._summaries(recent, weights)
            kept = np.arange(summaries.shape[1]) < blocks[:, None]
            older = self._older.prepare(summaries, kept, chosen, self.compressed, 1)
            self._older.accept(older)
        self._recent.accept(recent)

    def _summaries(self, recent: Change, weights: tuple[Any, ...]) -> Any:
        """What leaves the recent states, (listed, E, dim), as (listed, E/rate, dim), as it is stored."""
        gone = recent.gone
        if self.method == "most_used":  # how many a row keeps depends on how many left
            return self._most_used(gone, recent.gone_usage, recent.leaving)
        wide = cast(gone, computing_dtype(gone))
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is about to be told
            made = cast(detached(compressed(wide, self.rate, self.method, weights)), gone.dtype)
        if not checks.all_finite(made):
            expected = f"states whose summaries stay within the range of {self.dtype}"
            raise NonFiniteError("x", expected, "some beyond it", "Scale the states, or the weights.")
        return made

    def _most_used(self, gone: Any, usage: np.ndarray, leaving: np.ndarray) -> Any:
        xp, most = namespace(gone), gone.shape[1] // self.rate
        rows = []
        for i, left in enumerate(leaving):
            of_row = gone[i, : int(left), ...]
            kept = most_used(of_row, self.rate, like_of(usage[i, :left], gone, gone.dtype))
            rows.append(xp.concat([kept, xp.zeros_like(gone[i, : most - kept.shape[0], ...])], axis=0))
        return xp.stack(rows)

    def _checked(self, weights: Any) -> tuple[Any, ...]:
        """`weights`, if they are those that the method takes, and finite."""
        weights = checked_weights(self.method, self.rate, self.dim, weights)
        checks.finite(**{f"weights[{i}]": w for i, w in enumerate(weights)})
        return weights

    def _weights_beside(self, x: Any) -> tuple[Any, ...]:
        weights = self._checked(self.weights)
        return tuple(like_of(to_numpy(detached(w)), x, computing_dtype(x)) for w in weights)

    @exclusive
    def attended(self, weights: Any, rows: Sequence[int] | None = None) -> None:
        """Note how much attention each recent state drew; "most_used" keeps those that drew most.

        Parameters
        ----------
        weights : array (rows, m)
            Attention on the m newest recent states, the newest last, summed over heads and queries; at least 0.
        rows : sequence of int, optional
            Which rows the first axis stands for; all by default.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, ArgumentError
        """
        chosen = listed(rows, self.rows)
        checks.floating_arrays(weights=weights)
        checks.shape("weights", weights, len(chosen), "m", whole=True)
        mass, m = to_numpy(weights).astype(np.float64), int(weights.shape[1])
        if m > self._recent.width:
            raise ShapeError(
                "weights", f"at most {self._recent.width} states", str(m), "Leave out the compressed ones."
            )
        if not np.isfinite(mass).all() or (mass < 0).any():
            raise ArgumentError("weights", "finite mass of at least 0", "other", "Pass softmax weights.")
        self._recent.usage[chosen, self._recent.width - m :] += mass

    @shared
    def state_dict(self) -> dict[str, np.ndarray]:
        """States, counts and weights as a flat dict of arrays; "config" holds the rest as JSON bytes."""
        names = ("rows", "dim", "capacity", "compressed", "rate", "method", "dtype")
        arrays = self._arrays() | {f"weights.{i}": np.array(to_numpy(detached(w))) for i, w in enumerate(self.weights)}
        return pack(self._kind, {name: getattr(self, name) for name in names}, arrays)

    @classmethod
    def _restored(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        weights = tuple(arrays[f"weights.{i}"] for i in range(2) if f"weights.{i}" in arrays)
        memory = rebuilt(cls, config, weights=weights)
        memory._put_back(arrays)
        return memory
