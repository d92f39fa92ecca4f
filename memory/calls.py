"""What stored memories ask of their store: to be in main memory, and that what changes them is kept for the commit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..backends.errors import FileError, StoreError
from .entry import Entry, encoded
from .guard import Guard
from .kinds import REPEATED
from .quota import Quota
from .record import Record, encode
from .rows import listed
from .session import Session
from .shelf import Shelf

READER_TRIES = 100  # of a reader whose memory is rewritten while it reads


class Calls:
    """The calls of all memories of one open store: each takes effect in main memory, and waits for the commit."""

    def __init__(self, session: Session, quota: Quota, cache: int):
        self.session, self.quota = session, quota
        self.shelf = Shelf(cache, self._load)

    def guard(self, entry: Entry) -> Guard:
        """What a stored memory stands for, in main memory.

        Raises
        ------
        ForkError, StoreError, FileError
        """
        self.session.usable()
        entry.alive()
        return self.shelf.guard(entry)

    @contextlib.contextmanager
    def changing(self, entry: Entry) -> Iterator[Guard]:
        """With an open memory, for a call other than write and clear; the next commit writes its whole state.

        Others may be in it too. It stays in main memory meanwhile, and what a commit during the call may have missed
        is left to the next.
        """
        self.session.usable()
        self._changed(entry, 1)
        try:
            yield self.guard(entry)
        finally:
            self._changed(entry, -1)

    def _changed(self, entry: Entry, begun: int) -> None:
        if not self.session.readonly:
            with entry.lock:
                entry.changing += begun
                entry.whole = entry.touched = True

    def move(self, entry: Entry, home: dict[str, Any]) -> None:
        """Hold a memory elsewhere from now on, while it is open; on the disk nothing changes.

        Raises
        ------
        BackendError, ArgumentError
            It stays where it is.
        """
        with self._held(entry) as guard:
            guard.memory, entry.home = guard.memory.to(**home), home  # type: ignore[attr-defined]

    def write(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], source: str | None) -> None:
        """Write now, and remember the call for the commit; a rejected call changes nothing.

        Raises
        ------
        QuotaError, StoreError, FileError, and what the memory's write raises
        """
        if source is not None:
            encoded(source, "source")
        with self.writing(entry) as guard:
            record, arguments = encode("write", {"call": guard.bind(args, kwargs), "source": source})
            repeated, whole = entry.about["kind"] in REPEATED, entry.whole
            entry.whole = whole or not repeated
            try:
                grown = guard.nbytes + guard.growth(arguments["call"], record.nbytes)
                with self.quota.admitted(entry, record.nbytes if repeated else 0, grown):
                    guard.write(arguments["call"], source)
            except BaseException:
                entry.whole = whole
                raise
            entry.touched = True
            if repeated:
                self._wait(entry, record)

    def clear(self, entry: Entry, rows: Any) -> None:
        """Clear now, and see to it that what was cleared leaves the disk.

        Raises
        ------
        ArgumentError, StoreError, FileError
        """
        with self.writing(entry) as guard:
            chosen = None if rows is None else listed(rows, len(guard.counts))
            record, _ = encode("clear", {"rows": chosen})
            guard.clear(chosen)
            entry.touched = True
            longer = entry.bytes + record.nbytes
            if rows is None or entry.about["kind"] not in REPEATED:  # an empty state is smaller than the calls
                entry.waiting, entry.waiting_bytes, entry.whole = [], 0, True
                entry.bytes = min(entry.bytes, guard.nbytes)
            elif entry.whole or not self.quota.fits(entry, longer):  # to forget is never refused
                entry.whole = True
            else:
                entry.bytes = longer
                self._wait(entry, record)
            self.quota.count(entry)

    def _wait(self, entry: Entry, record: Record) -> None:
        entry.waiting.append(record)
        entry.waiting_bytes += record.nbytes
        self.quota.count(entry)

    @contextlib.contextmanager
    def writing(self, entry: Entry) -> Iterator[Guard]:
        """With an open memory to oneself."""
        self.session.usable(write=True)
        with self._held(entry) as guard:
            yield guard

    @contextlib.contextmanager
    def _held(self, entry: Entry) -> Iterator[Guard]:
        while True:
            guard = self.guard(entry)
            with entry.lock:
                entry.alive()
                if entry.guard is guard:  # else it left main memory in between
                    yield guard
                    return

    def commit(self, work: list[Entry]) -> None:
        """Make what waits in `work`, and all deletions, durable; with the connection to oneself.

        Raises
        ------
        StoreError, FileError
        """
        try:
            self.session.commit(work)
        finally:
            for entry in work:
                with entry.lock:
                    self.quota.count(entry)
        self.shelf.trim(work)

    def follow(self) -> None:
        """In a store that is open for reading only: see what has been committed since; with its connection to oneself.

        Raises
        ------
        FileError, StoreError
        """
        if self.session.readonly:
            with self.session.engine.transaction(write=False):
                self.session.catalogue.follow(self.shelf)

    def _load(self, entry: Entry) -> Guard:
        """For the shelf: a memory that is not in main memory."""
        with self.session.using():
            engine, catalogue = self.session.engine, self.session.catalogue
            for tries in range(READER_TRIES):
                seen = catalogue.facts
                try:
                    with engine.transaction(write=False):
                        if self.session.readonly:
                            catalogue.follow(self.shelf)
                        guard = catalogue.load(entry)
                    break
                except FileError as error:
                    if isinstance(error, StoreError) or not self.session.readonly or tries == READER_TRIES - 1:
                        raise
                    self.follow()
                    if catalogue.facts == seen:  # else the writer has used the room of what was being read
                        raise
            self.shelf.keep(entry)
            return guard
