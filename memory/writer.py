"""The right to write to a store: one process has it, or none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..backends.errors import FileError, StoreError
from .disk import refuse_odd, unreadable

LOCK = "lock"  # the file's name in the store's folder


class WriterLock:
    """The right to write to a store, held by one process, and in it by one Store; the system frees it when it ends."""

    def __init__(self, folder: Path):
        path = folder / LOCK
        refuse_odd(path, missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
            flags |= getattr(os, name, 0)
        try:
            self.descriptor = os.open(path, flags, 0o600)
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

    def close(self) -> None:
        """Give the right back."""
        os.close(self.descriptor)
