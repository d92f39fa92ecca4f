"""What every memory can do, whatever it remembers and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np


@runtime_checkable
class Memory(Protocol):
    """State with three verbs, write, read and clear, over rows that never see one another.

    A segment is read against what was written before it. A rejected call changes nothing.
    """

    @property
    def tokens(self) -> np.ndarray:
        """Tokens remembered now, an int64 array (rows,)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes the memory holds."""
        ...

    def write(self, *args: Any, **kwargs: Any) -> None:
        """Remember a segment."""
        ...

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows`, or in all of them."""
        ...

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything there is to save, as a flat dict of arrays; "config" holds JSON as uint8."""
        ...

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """A memory that behaves from here on exactly as the saved one would have."""
        ...
