"""Which of a store's memories are open: as many as fit the cache, the longest unused leave first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from .entry import Entry
from .guard import Guard


class Shelf:
    """Open memories by name. Those with uncommitted writes stay, those being changed, and the one used last.

    A thread that is reading a memory while it leaves reads on: what leaves is only the shelf's hold on it.
    """

    def __init__(self, cache: int, load: Callable[[Entry], Guard]):
        self.cache, self._load = cache, load
        self._table = threading.Lock()  # guards _open, and the leaving of memories
        self._open: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0  # held by what is open, as last counted
        self._kept = 0  # memories kept since all were counted
        self.evictions = 0

    def guard(self, entry: Entry) -> Guard:
        """The memory of `entry`, brought into main memory where it is not."""
        with self._table:
            guard = entry.guard
            if guard is not None and not entry.deleted:
                self._open[entry.name] = entry
                self._open.move_to_end(entry.name)
                return guard
        return self._load(entry)

    def keep(self, entry: Entry) -> None:
        """Note that a memory is open, and make room for it."""
        with self._table:
            self._open[entry.name] = entry
            self._open.move_to_end(entry.name)
            self._kept += 1
        self.trim([entry])

    def trim(self, grown: Iterable[Entry]) -> None:
        """Let memories leave until the rest fits the cache, those in `grown` counted anew."""
        with self._table:
            if self._kept > len(self._open):  # now and then all: what is read may grow an index
                grown, self._kept = list(self._open.values()), 0
            for entry in grown:
                self._count(entry)
            if self._bytes <= self.cache:
                return
            for entry in list(self._open.values())[:-1]:
                if self._bytes <= self.cache:
                    return
                if entry.touched or entry.changing or not entry.lock.acquire(blocking=False):
                    continue
                try:
                    if not entry.touched and not entry.changing:
                        entry.guard = None
                        self._leave(entry)
                        self.evictions += 1
                finally:
                    entry.lock.release()

    def drop(self, entry: Entry) -> None:
        """Let a memory leave, whatever waits."""
        with self._table:
            entry.guard = None
            if self._open.get(entry.name) is entry:
                self._leave(entry)

    def entries(self) -> list[Entry]:
        """The entries of all open memories."""
        with self._table:
            return list(self._open.values())

    def _count(self, entry: Entry) -> None:
        guard = entry.guard
        held = guard.nbytes if guard is not None and self._open.get(entry.name) is entry else 0
        self._bytes, entry.held = self._bytes + held - entry.held, held

    def _leave(self, entry: Entry) -> None:
        del self._open[entry.name]
        self._count(entry)

    def stats(self) -> dict[str, float]:
        """How many memories are open, and what they hold."""
        with self._table:
            for entry in self._open.values():
                self._count(entry)
            return {
                "perdure_store_memories_open": len(self._open),
                "perdure_store_cache_bytes": self._bytes,
                "perdure_store_evictions_total": self.evictions,
            }
