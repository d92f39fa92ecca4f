"""What memories of hidden states have in common: windows of them, which are written to, read and cleared by the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backends.arrays import namespace
from ..backends.exchange import to_numpy
from ..core import checks
from .file import Savable
from .lock import ReadWriteLock, exclusive, shared
from .rows import detached, listed, segment
from .state import counts, required
from .window import States, Window

DTYPES = ("float32", "float16", "float64")


class Windowed(Savable):
    """Windows of states of every row, by name, what they hold in the order of time."""

    def __init__(self, rows: int, dim: int, capacity: int, dtype: str):
        self._lock = ReadWriteLock()
        self.rows, self.dim = checks.count("rows", rows), checks.count("dim", dim)
        self.capacity, self.dtype = checks.count("capacity", capacity), checks.choice("dtype", dtype, DTYPES)
        self._windows: dict[str, Window] = {}

    def _window(self, width: int) -> Window:
        return Window(self.rows, width, self.dim, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(window.nbytes for window in self._windows.values())

    @exclusive
    def write(self, x: Any, rows: Sequence[int] | None = None, mask: Any = None) -> None:
        """Append hidden states; what exceeds the capacity leaves, the oldest first.

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
        if chosen:
            self._append(x, present, chosen)

    def _append(self, x: Any, present: np.ndarray, chosen: list[int]) -> None:
        raise NotImplementedError

    @shared
    def read(self, like: Any = None, rows: Sequence[int] | None = None) -> States:
        """All states of every row, the oldest first, to attend to before those of the present segment.

        Parameters
        ----------
        like : array (...), optional
            In whose framework and on whose device they are wanted; those of the last write by default.
        rows : sequence of int, optional
            Which rows; all by default.

        Returns
        -------
        States
            states (rows, m, dim) and mask (rows, m), m the most that any of them holds in each window.

        Raises
        ------
        ArgumentError
        """
        chosen, windows = listed(rows, self.rows), list(self._windows.values())
        like = windows[-1].states if like is None else like
        parts, xp = [window.read(like, chosen) for window in windows], namespace(like)
        return States(xp.concat([p.states for p in parts], axis=1), xp.concat([p.mask for p in parts], axis=1))

    @exclusive
    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows`, or in all of them.

        Raises
        ------
        ArgumentError
        """
        chosen = listed(rows, self.rows)
        for window in self._windows.values():
            window.clear(chosen)

    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays of all windows, for a state_dict."""
        arrays = {}
        for name, window in self._windows.items():
            arrays[f"{name}.states"] = np.array(to_numpy(detached(window.states))).astype(window.dtype)
            arrays[f"{name}.usage"], arrays[f"{name}.stored"] = window.usage.copy(), window.stored.copy()
        return arrays

    def _put_back(self, arrays: dict[str, np.ndarray]) -> None:
        """What `_arrays` gave, into the windows.

        Raises
        ------
        ArgumentError
        """
        for name, window in self._windows.items():
            shape = tuple(window.states.shape)
            states = required(arrays, f"{name}.states", shape, np.dtype(window.dtype))
            checks.finite(**{f"state['{name}.states']": states})
            usage = required(arrays, f"{name}.usage", shape[:2], np.float64)
            checks.finite(**{f"state['{name}.usage']": usage})
            stored = counts(arrays, f"{name}.stored", shape[0], window.width)
            window.states, window.usage, window.stored = states, usage, stored
