"""The memory of a Transformer-XL: the last hidden states of every row, to be attended to in full."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from .lock import shared
from .state import pack, rebuilt
from .windowed import Windowed


class RecurrentMemory(Windowed):
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

    _kind = "RecurrentMemory"

    def __init__(self, rows: int, dim: int, capacity: int, *, dtype: str = "float32"):
        super().__init__(rows, dim, capacity, dtype)
        self._windows = {"window": self._window(self.capacity)}

    @property
    def tokens(self) -> np.ndarray:
        """States held now, int64 (rows,)."""
        return self._windows["window"].stored.copy()

    def _append(self, x: Any, present: np.ndarray, chosen: list[int]) -> None:
        window = self._windows["window"]
        window.accept(window.prepare(x, present, chosen, self.capacity, 1))

    @shared
    def state_dict(self) -> dict[str, np.ndarray]:
        """The states and their counts as a flat dict of arrays; "config" holds the constructor's arguments."""
        config = {name: getattr(self, name) for name in ("rows", "dim", "capacity", "dtype")}
        return pack(self._kind, config, self._arrays())

    @classmethod
    def _restored(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        memory = rebuilt(cls, config)
        memory._put_back(arrays)
        return memory
