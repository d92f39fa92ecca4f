"""All memories of a store as they are on the disk: reading, following another process, committing.

Whoever calls holds the store's connection; an entry's lock is taken inside, never the other way round.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ..backends.errors import FileError, StoreError
from . import ledger
from .engine import Engine
from .entry import Entry, encoded
from .guard import Guard
from .ledger import Place
from .record import Record
from .shelf import Shelf

FEWEST_BYTES = 32 << 20  # on the disk, below which a commit does not rewrite a memory as one state
WASTE = 1.5  # times the bytes of a memory that it may take on the disk before a commit does
MOST_RECORDS = 4096  # after which a commit does
MOST_CALLS = 256  # after which a checkpoint does


class Catalogue:
    """The entries by name, and the engine they are kept in."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.entries: dict[str, Entry] = {}
        self.dropped: list[int] = []  # ids of deleted memories, until the next commit
        self.facts: dict[str, int] = {}
        self.states = self.appends = self.loads = 0
        with engine.transaction(write=False):
            self._read()

    def _read(self) -> None:
        """Bring the entries up to what is committed; those that are gone know it afterwards."""
        self.facts, rows = self.engine.catalogue()
        found = {}
        for row in rows:
            name, about, place = self._parsed(row)
            entry = self.entries.get(name)
            if entry is None or entry.place is None or entry.place.id != place.id:
                entry = Entry(name, about, place, None)
            elif entry.place.chain != place.chain:
                entry.lies(place)
            found[name] = entry
        for name, entry in self.entries.items():
            entry.deleted = found.get(name) is not entry
        self.entries = found

    def _parsed(self, row: tuple[Any, ...]) -> tuple[str, dict[str, Any], Place]:
        number, name, text, epoch, records, size, stale, chain, _ = row
        try:
            about = json.loads(text)
            if about.keys() != {"kind", "config", "options"}:
                raise ValueError("other keys")
            return name.decode(), about, Place(number, epoch, records, size, bool(stale), chain)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise self.engine.damaged("a readable entry") from error

    def follow(self, shelf: Shelf) -> None:
        """See what another process has committed; inside a transaction.

        Open memories are brought along by repeating its calls, where that is enough, and else are read anew when used.
        """
        if self.engine.facts() == self.facts:
            return
        before = {entry: entry.place for entry in shelf.entries()}
        self._read()
        for entry, seen in before.items():
            place, guard = entry.place, entry.guard
            if place is None or seen is None or (not entry.deleted and seen.chain == place.chain):
                continue
            shelf.drop(entry)
            if not entry.deleted and guard is not None and seen.epoch == place.epoch and seen.records < place.records:
                try:
                    ledger.catch_up(self.engine, guard, seen, place)
                except FileError:
                    continue  # the writer went on meanwhile, or it is damaged: whoever reads it next will see
                entry.guard, entry.place = guard, replace(place, state_bytes=seen.state_bytes)
                shelf.keep(entry)

    def load(self, entry: Entry) -> Guard:
        """The memory of `entry`, read and repeated; inside a transaction.

        Raises
        ------
        FileError
            Damaged.
        StoreError
            Deleted.
        """
        with entry.lock:
            entry.alive()
            if entry.guard is None and entry.place is not None:
                about = entry.about
                guard, entry.place = ledger.revive(self.engine, entry.place, about["kind"], about["options"])
                if entry.home:
                    guard.memory = guard.memory.to(**entry.home)  # type: ignore[attr-defined]
                entry.guard = guard
                self.loads += 1
            if entry.guard is None:
                raise self.engine.damaged(f"the memory {entry.name!r}")
            return entry.guard

    def commit(self, work: list[Entry]) -> None:
        """Write what waits in `work`, and all deletions, at once; where that fails, everything waits again.

        Raises
        ------
        StoreError, FileError
        """
        taken: list[tuple[Entry, list[Record], bool]] = []
        after: list[tuple[Entry, Place]] = []
        dropped, facts = list(self.dropped), dict(self.facts)
        facts["commits"] += 1
        try:
            with self.engine.transaction():
                if self.engine.facts() != self.facts:
                    raise StoreError("commit", "the store as it was left", "a commit that had failed", "Open it again.")
                for memory in dropped:
                    self.engine.drop_records(memory)
                    ledger.drop_entry(self.engine, facts, memory)
                for entry in work:
                    self._write(entry, facts, taken, after)
                self.engine.put_facts(facts)
        except BaseException:
            for entry, calls, whole in taken:
                self._wait_again(entry, calls, whole)
            raise
        self.facts = facts
        del self.dropped[: len(dropped)]
        for entry, place in after:
            with entry.lock:
                most = entry.bytes
                entry.lies(place)
                if entry.whole:  # something was done to it meanwhile, and its state is to follow
                    entry.bytes = max(most, entry.bytes)
                if entry.deleted:  # while it was being written
                    self.dropped.append(place.id)

    def give_back(self) -> None:
        """Return free space to the file system, and overwrite with zeros what cannot be returned.

        Raises
        ------
        StoreError, FileError
        """
        self.engine.shrink()
        facts = {**self.facts, "commits": self.facts["commits"] + 1}
        if self.engine.tidy(facts):
            self.facts = facts
        self.engine.bodies.wipe()

    def _write(self, entry: Entry, facts: dict[str, int], taken: list[Any], after: list[Any]) -> None:
        with entry.lock:
            if entry.deleted or not entry.touched:
                return
            place, calls, guard = entry.place, entry.waiting, entry.guard
            whole = entry.whole or place is None or (guard is not None and self.outgrown(entry, place, guard))
            taken.append((entry, calls, whole))
            entry.waiting, entry.waiting_bytes, entry.whole, entry.touched = [], 0, False, False
            if place is None:
                facts["ids"] += 1
                place = Place(facts["ids"], facts["commits"])
            if whole and guard is not None:
                place = ledger.put_state(self.engine, Place(place.id, facts["commits"]), guard)
        for record in () if whole else calls:
            place = ledger.put_call(self.engine, place, record)
        ledger.put_entry(self.engine, facts, encoded(entry.name), entry.about, place)
        after.append((entry, place))
        self.states, self.appends = self.states + whole, self.appends + (not whole)

    def _wait_again(self, entry: Entry, calls: list[Record], whole: bool) -> None:
        with entry.lock:
            if entry.waiting is not calls:  # it is, where the commit was interrupted before it had taken them
                entry.waiting[:0] = calls
            entry.waiting_bytes = sum(record.nbytes for record in entry.waiting)
            entry.whole, entry.touched = entry.whole or whole, True

    @staticmethod
    def outgrown(entry: Entry, place: Place, guard: Guard) -> bool:
        """Whether so much of the records is overwritten, or they are so many, that a state should replace them."""
        most = max(FEWEST_BYTES, WASTE * guard.nbytes)
        return entry.bytes > most or place.records + len(entry.waiting) > MOST_RECORDS

    def compactable(self, place: Place) -> bool:
        """Whether a checkpoint should write a memory's state: its calls are many, large, or hold what was cleared."""
        if place.stale or place.records > MOST_CALLS or place.records == 1:
            return place.records > 1
        state = place.state_bytes or self.engine.record_bytes(place.id, 0)  # known, once it has been read
        return place.size > 2 * state

    def verify(self) -> None:
        """Compare everything with its checksums; inside a transaction.

        Raises
        ------
        FileError
        """
        found = self.engine.connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise self.engine.damaged(f"an undamaged database ({found})")
        known = set()
        for row in self.engine.catalogue()[1]:
            _, about, place = self._parsed(row)
            ledger.revive(self.engine, place, about["kind"], about["options"])
            known.add(place.id)
        held = {memory for (memory,) in self.engine.connection.execute("SELECT DISTINCT memory FROM records")}
        if held - known:
            raise self.engine.damaged("records of known memories only")
