"""The right to write to a store, which one process has, or none; and its note of how many commits there are.

SQLite's log ends at its first damaged frame, so that damage to it looks like commits that never were. The note, made
after each commit in the file of the lock, tells: a database that knows of fewer commits has lost some. It is not
flushed, as it need not be: where it is late, or torn, it claims less.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zlib
from pathlib import Path

from ..backends.errors import FileError, StoreError
from .disk import SAFELY, opened, refuse_odd, unreadable

LOCK = "lock"  # the file's name in the store's folder
_NOTE = re.compile(rb"(\d{1,18}) commits ([0-9a-f]{8})\n")


def noted(folder: Path) -> int:
    """How many commits a writer has noted in the folder; 0 where there is no note.

    Raises
    ------
    FileError
        Something else than a file in its place.
    """
    path = folder / LOCK
    refuse_odd(path, missing_ok=True)
    if not path.exists():
        return 0
    with opened(path) as (descriptor, _):
        found = _NOTE.fullmatch(os.read(descriptor, 64))
    return int(found[1]) if found and int(found[2], 16) == zlib.crc32(found[1]) else 0


class WriterLock:
    """The right to write to a store, held by one process, and in it by one Store; the system frees it when it ends."""

    def __init__(self, folder: Path):
        path = folder / LOCK
        refuse_odd(path, missing_ok=True)
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | SAFELY, 0o600)
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
                raise FileError(str(path), "a regular file", "something else", "Remove it.")
            self._take()
        except OSError as error:
            os.close(self.descriptor)
            if isinstance(error, FileError):
                raise
            raise StoreError(
                str(folder),
                "no other writer",
                "a store that is open for writing already",
                "Close it there, or open it here with readonly=True.",
            ) from error

    def _take(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(self.descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def note(self, commits: int) -> None:
        """Note that so many commits are on the disk."""
        number = b"%d" % commits
        with contextlib.suppress(OSError):  # then the note stays as it was, and claims less
            os.pwrite(self.descriptor, b"%b commits %08x\n" % (number, zlib.crc32(number)), 0)

    def close(self) -> None:
        """Give the right back."""
        os.close(self.descriptor)
