"""The memory of a Transformer-XL: the last hidden states of every row, to be attended to in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from ..backends.exchange import to_numpy
from ..core import checks
from .file import Savable
from .lock import ReadWriteLock, exclusive, shared
from .rows import detached, listed, segment
from .state import counts, pack, rebuilt, required, unpack
from .window import States, Window

DTYPES = ("float32", "float16", "float64")


class RecurrentMemory(Savable):
    """The newest `capacity` hidden states of every row, one layer's worth.

    Parameters
    ----------
    rows : int
        Documents, users or batch elements; none ever sees another's states.
    dim : int
        Width of a state.
    capacity : int
        The most states held per row; the oldest leave first.
    dtype : {"float32", "float16", "float64"}
        What states are stored as.

    Raises
    ------
    ArgumentError
        A size below 1, or an unknown dtype.

    Notes
    -----
    Bytes: rows x capacity x dim x itemsize. The states live in the framework and on the device of what was last
    written, without a graph. Source: Dai et al., "Transformer-XL" (ACL 2019, arXiv 1901.02860), section 3.2.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> memory = perdure.RecurrentMemory(rows=1, dim=2, capacity=3)
    >>> memory.write(np.arange(10.0).reshape(1, 5, 2))
    >>> memory.read().states[0, :, 0]
    array([4., 6., 8.], dtype=float32)
    """

    def __init__(self, rows: int, dim: int, capacity: int, *, dtype: str = "float32"):
        self._lock = ReadWriteLock()
        self.rows, self.dim = checks.count("rows", rows), checks.count("dim", dim)
        self.capacity, self.dtype = checks.count("capacity", capacity), checks.choice("dtype", dtype, DTYPES)
        self._window = Window(self.rows, self.capacity, self.dim, self.dtype)

    @property
    def tokens(self) -> np.ndarray:
        """States held now, int64 (rows,)."""
        return self._window.stored.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return self._window.nbytes

    @exclusive
    def write(self, x: Any, rows: Sequence[int] | None = None, mask: Any = None) -> None:
        """Append hidden states; where a row is full, its oldest leave.

        Parameters
        ----------
        x : array (rows, n, dim)
            Any n, none and more than the capacity included.
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
        x, present = segment(x, len(chosen), self.dim, mask, self.dtype)
        self._window.append(x, present, chosen, self.capacity, 1)

    @shared
    def read(self, like: Any = None, rows: Sequence[int] | None = None) -> States:
        """The states of every row, to attend to before those of the present segment.

        Parameters
        ----------
        like : array (...), optional
            In whose framework and on whose device they are wanted; those of the last write by default.
        rows : sequence of int, optional
            Which rows; all by default.

        Returns
        -------
        States
            states (rows, m, dim) and mask (rows, m), m the most that any of them holds.

        Raises
        ------
        ArgumentError
        """
        return self._window.read(self._window.states if like is None else like, listed(rows, self.rows))

    @exclusive
    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows`, or in all of them.

        Raises
        ------
        ArgumentError
        """
        self._window.clear(listed(rows, self.rows))

    @shared
    def state_dict(self) -> dict[str, np.ndarray]:
        """The states and their counts as a flat dict of arrays; "config" holds the constructor's arguments."""
        config = {name: getattr(self, name) for name in ("rows", "dim", "capacity", "dtype")}
        return pack("RecurrentMemory", config, window_arrays("window", self._window))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The memory that `state` describes; its behaviour is bit-identical from here on.

        Raises
        ------
        ArgumentError
            No state of a RecurrentMemory, or an altered one.
        """
        config, arrays = unpack("RecurrentMemory", state)
        memory = rebuilt(cls, config)
        restore_window(memory._window, "window", arrays)
        return memory


def window_arrays(name: str, window: Window) -> dict[str, np.ndarray]:
    """The arrays of a window, for a state_dict."""
    states = np.array(to_numpy(detached(window.states))).astype(window.dtype)
    return {f"{name}.states": states, f"{name}.usage": window.usage.copy(), f"{name}.stored": window.stored.copy()}


def restore_window(window: Window, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Put arrays made by `window_arrays` into `window`.

    Raises
    ------
    ArgumentError
    """
    shape = tuple(window.states.shape)
    states = required(arrays, f"{name}.states", shape, np.dtype(window.dtype))
    checks.finite(**{f"state['{name}.states']": states})
    usage = required(arrays, f"{name}.usage", shape[:2], np.float64)
    stored = counts(arrays, f"{name}.stored", shape[0], window.width)
    window.states, window.usage, window.stored = states, usage, stored
