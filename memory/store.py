"""Many named memories in one folder, durable, isolated and bounded."""

from __future__ import annotations

import logging
import os
import time
from typing import Any, Self

from ..backends.devices import place_of
from ..backends.errors import ArgumentError, QuotaError, StoreError
from ..core import checks
from .calls import Calls
from .disk import as_path
from .entry import Entry, clipping, comparable, encoded
from .guard import Guard
from .kinds import MOVABLE, config_of, make
from .quota import Quota
from .session import Session
from .stored import StoredMemory

MOST_NAMES = 1_000_000
LARGEST_LOG = 4 << 20  # bytes of the write-ahead log, after which a commit carries it over

_log = logging.getLogger("perdure.store")
_log.addHandler(logging.NullHandler())


def open(
    path: str | os.PathLike[str],
    *,
    readonly: bool = False,
    quota: int | None = None,
    cache: int = 1 << 30,
    buffer: int = 256 << 20,
) -> Store:
    """Open a store of memories, and make it where there is none.

    Parameters
    ----------
    path : path
        A folder, which belongs to the store alone.
    readonly : bool
        Read what is committed, while another process may be writing.
    quota : int, optional
        The most bytes all memories may take on the disk.
    cache : int
        Bytes of memories kept open in main memory; the longest unused leave first. One in use always fits.
    buffer : int
        The most bytes of writes that wait for a commit.

    Returns
    -------
    Store
        Close it, or use it as a context manager.

    Raises
    ------
    StoreError
        Another process, or this one, has it open for writing.
    FileError
        Something that is no store, a damaged one, or one of a newer version.

    Notes
    -----
    Cost: the names and places of all memories are read and verified; the memories themselves when they are used.

    Examples
    --------
    >>> import numpy as np, perdure, tempfile
    >>> folder = tempfile.mkdtemp() + "/memories"
    >>> with perdure.open(folder) as store:
    ...     memory = store.memory("user-42", kind="knn", rows=1, heads=2, dim=8, capacity=100)
    ...     memory.write(np.ones((1, 2, 3, 8)), values=np.ones((1, 2, 3, 8)))
    ...     store.commit()  # durable from here on
    >>> with perdure.open(folder, readonly=True) as store:
    ...     store.memory("user-42").tokens
    array([3])
    """
    return Store(path, readonly=readonly, quota=quota, cache=cache, buffer=buffer)


class Store:
    """Named memories that survive: `memory` to get one, `commit` to make what was written durable.

    Made by `perdure.open`, which documents the parameters. Threads may share a store and its memories; a process that
    forks must open its own in the child. Every method raises StoreError once the store is closed, and ForkError in a
    child of the process that opened it.

    Locks, from the outside in: the session's (the connection), an entry's (its one writer), the shelf's (which memories
    are open), and the memory's own. A read takes the shelf's for a moment, then the memory's, so no reader waits for a
    commit, unless the memory has left main memory and must be read from the disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        quota: int | None = None,
        cache: int = 1 << 30,
        buffer: int = 256 << 20,
    ):
        self.path, self.readonly = as_path(path), bool(readonly)
        self._quota = Quota(None if quota is None else checks.count("quota", quota), checks.count("buffer", buffer))
        cache = checks.count("cache", cache)
        self._session = Session(self.path, self.readonly)
        self._calls = Calls(self._session, self._quota, cache)
        self._catalogue, self._engine = self._session.catalogue, self._session.engine
        self._commits, self._commit_seconds, self._checkpoints = 0, 0.0, 0
        for entry in self._catalogue.entries.values():
            self._quota.count(entry)
        _log.info("opened", extra={"store": str(self.path), "memories": len(self._catalogue.entries)})

    # ---- memories ----------------------------------------------------------------------------------------------------

    def memory(
        self,
        name: str,
        kind: str | None = None,
        *,
        quota: int | None = None,
        clip: float | None = 1.5,
        source_quota: int | None = None,
        device: Any = None,
        device_capacity: int | None = None,
        **config: Any,
    ) -> StoredMemory:
        """The memory called `name`; made, where there is none, if `kind` is given.

        Parameters
        ----------
        name : str
            Any text of at most 1,024 bytes. It is data: never part of a path or a query.
        kind : {"knn", "continuous", "recurrent", "compressive", "hybrid"}, optional
        quota : int, optional
            The most bytes it may take on the disk. This and what follows count when the memory is made.
        clip : float, optional
            Shorten keys longer than `clip` times what is ordinary in their row and head, so that a few very long ones
            cannot draw all attention; None leaves keys as they are. For kinds with keys.
        source_quota : int, optional
            The most tokens one `source` may write before the memory is cleared.
        device, device_capacity : optional
            Where it is held while it is open, as `KNNMemory` and `ContinuousMemory` take them; by default where it is,
            at first in main memory. What is on the disk says nothing of it: it is the same from every device.
        **config
            The arguments of that kind's class.

        Returns
        -------
        StoredMemory
            To be used like a memory of that kind. It is read from the disk when first used, and again after it has left
            the cache: its state, and the calls since then, which are repeated.

        Raises
        ------
        ArgumentError
            No such memory and no kind; an unknown, missing or wrong setting; or there is one that is not as described.
        BackendError
            No such device; then nothing has been made.
        QuotaError
            There are a million already, or it does not fit a quota.
        """
        place_of(device)
        with self._session.using():
            encoded(name)
            self._calls.follow()
            entry = self._catalogue.entries.get(name)
            there = kind if entry is None else entry.about["kind"]
            if device is not None and there not in MOVABLE:
                raise ArgumentError("device", f"None for kind {there!r}", repr(device), "Leave it out.")
            if entry is None:
                if kind is None or self.readonly:
                    raise ArgumentError("name", "the name of a memory", repr(name)[:200], "Give its kind to make it.")
                quotas = {"quota": quota, "source_quota": source_quota}
                counted = {key: None if n is None else checks.count(key, n) for key, n in quotas.items()}
                entry = self._make(name, kind, {"clip": clipping(clip), **counted}, config)
            else:
                entry.agree(kind, config)
            if device is not None:
                self._calls.move(entry, {"device": device, "device_capacity": device_capacity})
            return StoredMemory(self._calls, entry)

    def names(self) -> list[str]:
        """The names of all memories, sorted."""
        with self._session.using():
            self._calls.follow()
            return sorted(self._catalogue.entries)

    def sizes(self) -> dict[str, int]:
        """Bytes that every memory takes on the disk; with what waits for a commit, the most it will take."""
        with self._session.using():
            self._calls.follow()
            return {name: entry.bytes for name, entry in sorted(self._catalogue.entries.items())}

    def clear(self, name: str) -> None:
        """Forget all that the memory called `name` holds: durable with the next commit, no trace after `checkpoint`.

        Raises
        ------
        ArgumentError
            There is none.
        StoreError
            The store is open for reading only.
        """
        self.memory(name).clear()

    def delete(self, name: str) -> None:
        """Forget the memory called `name` and its name: off the disk with the next commit, no trace after `checkpoint`.

        Raises
        ------
        ArgumentError
            There is none.
        StoreError
            The store is open for reading only.
        """
        with self._session.using(write=True):
            entry = self.memory(name)._entry
            with entry.lock:
                entry.deleted, entry.waiting, entry.waiting_bytes = True, [], 0
                self._quota.count(entry)
                if entry.place is not None:
                    self._catalogue.dropped.append(entry.place.id)
            del self._catalogue.entries[name]
            self._calls.shelf.drop(entry)

    # ---- durability --------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make everything written, cleared, made and deleted so far durable, all at once; on return it is on the disk.

        Raises
        ------
        StoreError
            The disk failed. Nothing is lost: what was committed before is there, what was not waits for another try.

        Notes
        -----
        Cost: one write of the new calls, and two flushes. Where a third of what a memory has on the disk is
        overwritten, its state is written instead; every 4 MiB or so of the database's log, it is carried over.
        """
        with self._session.using(write=True):
            started = time.perf_counter()
            work = [entry for entry in self._calls.shelf.entries() if entry.touched]
            if not work and not self._catalogue.dropped:
                return
            self._calls.commit(work)
            try:
                if self._engine.log_bytes() > LARGEST_LOG:
                    self._engine.move_log(truncate=False)
            except StoreError as error:  # the commit itself is on the disk; the next one tries again
                _log.warning("log not carried over", extra={"store": str(self.path), "error": str(error)})
            self._commits += 1
            self._commit_seconds += time.perf_counter() - started
            _log.debug("committed", extra={"store": str(self.path), "memories": len(work)})

    def checkpoint(self) -> None:
        """Commit, compact, and leave no trace of what was cleared or deleted.

        Memories whose calls are many, large, or hold what was cleared are written as one state; free space, which has
        been overwritten with zeros, goes back to the file system; the log is carried over and emptied.

        Raises
        ------
        StoreError
            The disk failed, or another process was reading an old state for more than five seconds; then try again.
        """
        with self._session.using(write=True):
            self.commit()
            for entry in list(self._catalogue.entries.values()):
                if entry.place is None or not self._catalogue.compactable(entry.place):
                    continue
                with self._calls.writing(entry) as guard:
                    if not entry.place.stale and not self._quota.fits(entry, guard.nbytes):
                        continue
                    entry.whole = entry.touched = True
                self._calls.commit([entry])
            self._catalogue.give_back()
            if not self._engine.move_log(truncate=True):
                raise StoreError(
                    str(self.path),
                    "no reader of an old state",
                    "one that did not end",
                    "Call checkpoint again; until then, traces of what was deleted may remain.",
                )
            self._checkpoints += 1
            _log.info("checkpoint", extra={"store": str(self.path), "bytes": self._engine.disk_bytes()})

    def refresh(self) -> None:
        """Where the store is open for reading only: see what has been committed since.

        Open memories are brought along by repeating the writer's calls, or read anew when used next.

        Raises
        ------
        FileError
            Damaged.
        StoreError
            The disk failed.
        """
        with self._session.using():
            self._calls.follow()

    def verify(self) -> None:
        """Read everything, and compare it with its checksums; for a store that has lain long, or a copy of one.

        Raises
        ------
        FileError
            Damaged.

        Notes
        -----
        Cost: a read of all bytes, one SHA-256 over them, and every memory in turn in main memory.
        """
        with self._session.using(), self._engine.transaction(write=False):
            self._catalogue.verify()

    def stats(self) -> dict[str, float]:
        """Counters and sizes under Prometheus-style names; those that end in `_total` only grow while it is open."""
        with self._session.using():
            catalogue = self._catalogue
            return {
                "perdure_store_commits_total": self._commits,
                "perdure_store_commit_seconds_total": self._commit_seconds,
                "perdure_store_checkpoints_total": self._checkpoints,
                "perdure_store_states_total": catalogue.states,
                "perdure_store_appends_total": catalogue.appends,
                "perdure_store_loads_total": catalogue.loads,
                **self._calls.shelf.stats(),
                "perdure_store_memories": len(catalogue.entries),
                "perdure_store_memory_bytes": sum(entry.bytes for entry in catalogue.entries.values()),
                "perdure_store_waiting_bytes": self._quota.waiting,
                "perdure_store_disk_bytes": self._engine.disk_bytes(),
                "perdure_store_log_bytes": self._engine.log_bytes(),
            }

    def close(self) -> None:
        """Close the store; what was not committed is forgotten. Closing twice is closing once."""
        lost = any(entry.touched for entry in self._calls.shelf.entries())
        if self._session.close() and lost:
            _log.warning("closed with uncommitted writes", extra={"store": str(self.path)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        try:
            if kind is None and not self.readonly and not self._session.closed:
                self.commit()
        finally:
            self.close()

    def __repr__(self) -> str:
        return f"<Store {str(self.path)!r}, {len(self._catalogue.entries)} memories>"

    # ---- within ------------------------------------------------------------------------------------------------------

    def _make(self, name: str, kind: str, options: dict[str, Any], config: dict[str, Any]) -> Entry:
        if len(self._catalogue.entries) >= MOST_NAMES:
            raise QuotaError("name", f"at most {MOST_NAMES} memories", "one more", "Delete some.")
        memory = make(kind, config)
        state = memory.state_dict()
        guard = Guard(memory, state, kind, options["clip"], options["source_quota"])
        asked = {**config_of(state)[1], **comparable(config)}
        entry = Entry(name, {"kind": kind, "config": asked, "options": options}, None, guard)
        self._quota.take(entry, guard.nbytes)
        self._catalogue.entries[name] = entry
        self._calls.shelf.keep(entry)
        return entry
