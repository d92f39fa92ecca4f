"""A memory that lives in a store, as its user holds it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.errors import ArgumentError
from .file import Savable
from .kinds import REPEATED

if TYPE_CHECKING:
    from .calls import Calls
    from .entry import Entry


class StoredMemory(Savable):
    """A memory of a store: it is written, read and cleared like any other; `Store.commit` makes that durable.

    Every other public method and attribute is that of the memory itself: `read`, `search`, `capacity`, and so on. Only
    `Store.memory` makes one, from the `calls` it takes and its `entry` there.
    """

    __slots__ = ("_calls", "_entry")

    def __init__(self, calls: Calls, entry: Entry):
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_entry", entry)

    @property
    def name(self) -> str:
        """Its name in the store."""
        return self._entry.name

    @property
    def kind(self) -> str:
        """What it is: "knn", "continuous", "recurrent", "compressive" or "hybrid"."""
        return self._entry.about["kind"]

    @property
    def tokens(self) -> np.ndarray:
        """Tokens held now, int64 (rows,)."""
        return self._calls.guard(self._entry).memory.tokens

    @property
    def nbytes(self) -> int:
        """Bytes held in main memory."""
        return self._calls.guard(self._entry).memory.nbytes

    def write(self, *args: Any, source: str | None = None, **kwargs: Any) -> None:
        """The memory's own `write`, into main memory at once, and onto the disk with the next commit.

        Parameters
        ----------
        *args, **kwargs
            As that kind of memory takes them.
        source : str, optional
            Where the tokens come from, for the memory's `source_quota`: a text of at most 1,024 bytes.

        Raises
        ------
        QuotaError, StoreError, and what the memory's write raises
            In every case nothing has been written.
        """
        self._calls.write(self._entry, args, kwargs, source)

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows` (all by default); once the store is checkpointed, no trace of it is left.

        Raises
        ------
        ArgumentError
            Something else than rows it has; then nothing has been forgotten.
        """
        self._calls.clear(self._entry, rows)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The memory's own state, as a flat dict of arrays, uncommitted writes included."""
        return self._calls.guard(self._entry).memory.state_dict()

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> StoredMemory:
        """Not offered: a stored memory comes from its store, and no `state` makes one.

        Raises
        ------
        ArgumentError
        """
        raise ArgumentError("state", "a store", "a state_dict", "Use store.memory(name), or the memory's own class.")

    def save(self, path: Any) -> None:
        """Save a copy to one file at `path`, as the memory itself would.

        Raises
        ------
        FileError, MissingPackageError
        """
        self._calls.guard(self._entry).memory.save(path)  # type: ignore[attr-defined, unused-ignore]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "load_state_dict":
            raise AttributeError(name)
        found = getattr(self._calls.guard(self._entry).memory, name)
        if self.kind in REPEATED or not callable(found):
            return found

        @functools.wraps(found)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self._calls.changing(self._entry) as guard:
                return getattr(guard.memory, name)(*args, **kwargs)

        return called

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a stored memory changes by write and clear only")

    def __repr__(self) -> str:
        return f"<StoredMemory {self.name!r}, kind {self.kind!r}>"
