"""A store that is open: whose it is, until when, and who may use its connection now."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..backends.errors import FileError, ForkError, StoreError
from .catalogue import Catalogue
from .disk import made_folder
from .engine import Engine
from .entry import Entry
from .lock import forks
from .writer import WriterLock, noted


class Session:
    """The folder's one writer, or one of its readers, from opening to closing, in the process that opened it."""

    def __init__(self, path: Path, readonly: bool):
        self.path, self.readonly, self.closed = path, readonly, False
        self._forks, self._disk = forks(), threading.RLock()
        made_folder(path, create=not readonly)
        if any(os.path.samestat(os.stat(path), folder) for folder, _ in _orphans):
            raise self._forked()
        with contextlib.ExitStack() as undone:
            self.lock = None if readonly else WriterLock(path)
            if self.lock is not None:
                undone.callback(self.lock.close)
            self.engine = Engine(path, readonly)
            undone.callback(self.engine.close)
            known = noted(path)  # before the catalogue: meanwhile, a writer may go on
            self.catalogue = Catalogue(self.engine)
            if known > self.catalogue.facts["commits"]:
                raise FileError(
                    str(path),
                    f"the {known} commits that were acknowledged",
                    f"{self.catalogue.facts['commits']}; the rest was in a log that is damaged or gone",
                    "Restore the store from a copy, or delete its file 'lock' to go on from the earlier commit.",
                )
            self.folder = os.stat(path)
            undone.pop_all()
        self._release = weakref.finalize(self, _released, self._forks, self.engine, self.lock)
        self._release.atexit = False
        _sessions.add(self)

    @contextlib.contextmanager
    def using(self, write: bool = False) -> Iterator[None]:
        """With the connection to oneself; re-entrant.

        Raises
        ------
        ForkError, StoreError
        """
        self.usable(write)
        with self._disk:
            self.usable(write)
            yield

    def usable(self, write: bool = False) -> None:
        """Refuse a store that is closed, belongs to the parent process, or, where `write`, is open for reading only.

        Raises
        ------
        ForkError, StoreError
        """
        if self._forks != forks():
            raise self._forked()
        if self.closed:
            raise StoreError(str(self.path), "an open store", "a closed one", "Open it again.")
        if write and self.readonly:
            raise StoreError(str(self.path), "a store open for writing", "one open for reading", "Open it to write.")

    def _forked(self) -> ForkError:
        """SQLite's locks do not survive a fork, and a child cannot tell its own from those of its parent."""
        return ForkError(
            str(self.path),
            "a store that was not open when the process forked",
            "the child of a process that had it open",
            "Open it in a process started with the 'spawn' method, or fork before the parent opens it.",
        )

    def commit(self, work: list[Entry]) -> None:
        """Make what waits in `work`, and all deletions, durable, and note that they are; the connection is held.

        Raises
        ------
        StoreError, FileError
        """
        self.catalogue.commit(work)
        if self.lock is not None:
            self.lock.note(self.catalogue.facts["commits"])

    def close(self) -> bool:
        """Close, and say whether it was open; in a child of the process that opened it, nothing happens."""
        if self._forks != forks():  # asked first: at the fork, another thread may have held what is waited for below
            return False
        with self._disk:
            if self.closed:
                return False
            self.closed = True
            self._release()
            return True


def _released(opened_at: int, engine: Engine, lock: WriterLock | None) -> None:
    """Close the files; also of a store that was dropped without having been closed."""
    if opened_at != forks():
        return
    try:
        engine.close()
    finally:
        if lock is not None:
            lock.close()


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
# Folders and connections of the parent: kept, because to close them here would act on its files.
_orphans: list[tuple[os.stat_result, Any]] = []


def _orphan() -> None:
    for session in list(_sessions):
        if not session.closed:
            _orphans.append((session.folder, session.engine.connection))
            if session.lock is not None:
                session.lock.close()  # the child's copy, or the store would stay locked after the parent's end


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_orphan)
