"""How many bytes a store's memories take, and how many they may."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..backends.errors import QuotaError
from .entry import Entry


class Quota:
    """Bytes on the disk and bytes that wait for a commit, of all memories together, against their limits."""

    def __init__(self, most: int | None, buffer: int):
        self.most, self.buffer = most, buffer
        self.bytes = self.waiting = 0
        self._totals = threading.Lock()

    def count(self, entry: Entry) -> None:
        """Count anew what `entry` takes, or that it takes nothing any more."""
        with self._totals:
            self._count(entry)

    @contextlib.contextmanager
    def admitted(self, entry: Entry, call: int, state: int) -> Iterator[None]:
        """For a call of `call` bytes after which the state takes at most `state`; with the lock of `entry`.

        Where the calls of a memory no longer fit, but its state would, the next commit writes that. A call that is
        rejected takes nothing.

        Raises
        ------
        QuotaError
        """
        before = entry.bytes, entry.whole
        with self._totals:
            if self.waiting + call > self.buffer:
                waiting, remedy = f"{self.waiting + call}", "Call commit first, or write less at once."
                raise QuotaError("buffer", f"at most {self.buffer} bytes that wait", waiting, remedy)
            if not self._fits(entry, entry.bytes + call):
                entry.whole = True
            self._take(entry, state if entry.whole else entry.bytes + call, before)
        try:
            yield
        except BaseException:
            entry.bytes, entry.whole = before
            self.count(entry)
            raise

    def take(self, entry: Entry, size: int) -> None:
        """Let `entry` take `size` bytes on the disk.

        Raises
        ------
        QuotaError
        """
        with self._totals:
            self._take(entry, size, (entry.bytes, entry.whole))

    def fits(self, entry: Entry, size: int) -> bool:
        """Whether `entry` may take `size` bytes on the disk."""
        with self._totals:
            return self._fits(entry, size)

    def _limits(self, entry: Entry) -> Iterator[tuple[str, int, int]]:
        """Whose limit, what it is, and what others take of it."""
        for whose, most, others in (
            ("memory", entry.about["options"]["quota"], 0),
            ("store", self.most, self.bytes - entry.counted[0]),
        ):
            if most is not None:
                yield whose, most, others

    def _fits(self, entry: Entry, size: int) -> bool:
        return all(size + others <= most for _, most, others in self._limits(entry))

    def _take(self, entry: Entry, size: int, before: tuple[int, bool]) -> None:
        for whose, most, others in self._limits(entry):
            if size + others > most:
                entry.bytes, entry.whole = before
                needed = f"{size + others}"
                raise QuotaError(f"quota of the {whose}", f"at most {most} bytes", needed, "Clear or delete first.")
        entry.bytes = size
        self._count(entry)

    def _count(self, entry: Entry) -> None:
        now = (0, 0) if entry.deleted else (entry.bytes, entry.waiting_bytes)
        self.bytes += now[0] - entry.counted[0]
        self.waiting += now[1] - entry.counted[1]
        entry.counted = now
