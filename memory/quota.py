"""How many bytes a store's memories take, and how many they may."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ..backends.errors import QuotaError
from .entry import Entry


class Quota:
    """Bytes on the disk and bytes that wait for a commit, of all memories together, against their limits."""

    def __init__(self, most: int | None, buffer: int):
        self.most, self.buffer = most, buffer
        self.stored = self.waiting = 0
        self._totals = threading.Lock()

    def count(self, entries: Iterable[Entry]) -> None:
        """Count anew, after a commit."""
        entries = list(entries)
        with self._totals:
            self.stored = sum(entry.place.size for entry in entries if entry.place is not None)
            self.waiting = sum(entry.waiting_bytes for entry in entries)

    def wait(self, entry: Entry, size: int) -> None:
        """So many bytes more wait in `entry`, whose lock is held."""
        with self._totals:
            entry.waiting_bytes += size
            self.waiting += size

    def admit(self, entry: Entry, size: int) -> None:
        """Refuse a call of `size` bytes over a limit; where the state in place of the calls makes room, demand that.

        Raises
        ------
        QuotaError
        """
        if self.waiting + size > self.buffer:
            waiting = f"{self.waiting + size}"
            raise QuotaError("buffer", f"at most {self.buffer} bytes that wait", waiting, "Call commit first.")
        others = self.stored + self.waiting - entry.bytes
        for whose, most, beside in (("memory", entry.about["options"]["quota"], 0), ("store", self.most, others)):
            if most is None or entry.bytes + size + beside <= most:
                continue
            needed = entry.guard.memory.nbytes + size + beside if entry.guard else most + 1
            if needed > most:
                raise QuotaError(
                    f"quota of the {whose}", f"at most {most} bytes", f"{needed}", "Clear or delete first."
                )
            entry.whole = True
