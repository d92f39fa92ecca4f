"""The large parts of a store's records, in one file beside the database, which knows where each lies.

Two rules make it safe: a part is flushed to the disk before the database commits to it, and room is used again only
once the database has committed to its being free. What lies there is trusted no further than its checksum.
"""

from __future__ import annotations

import bisect
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..backends.errors import FileError, StoreError
from .disk import SAFELY, refuse_odd, sync_folder, write_at

FILE = "bodies"
BLOCK = 4096  # bytes; parts begin and end at multiples of it
LEAST_GROWTH, MOST_GROWTH = 64 << 10, 4 << 20  # bytes the file grows by, in zeros: writing over is faster than growing


class Bodies:
    """The file, and which of its blocks are free: gaps (start, size) in order, none beside another."""

    def __init__(self, folder: Path, readonly: bool):
        self.path, self.readonly = folder / FILE, readonly
        refuse_odd(self.path, missing_ok=not readonly)
        flags = SAFELY | (os.O_RDONLY if readonly else os.O_RDWR | os.O_CREAT)
        new = not self.path.exists()
        try:
            self.descriptor = os.open(self.path, flags, 0o600)
            if new:
                sync_folder(folder)
        except OSError as error:
            raise FileError(str(self.path), "a file of the store", str(error), "Check its permissions.") from error
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise FileError(str(self.path), "a regular file", "something else", "It changed while it was opened.")
        self.end = 0  # bytes of the file that are accounted for
        self.gaps: list[tuple[int, int]] = []
        self.soiled: list[tuple[int, int]] = []  # what may hold old bytes, all of it free
        self.unflushed = False

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.descriptor).st_size

    def use(self, parts: Iterable[tuple[int, int]]) -> None:
        """These (start, size), sorted, are in use; all else is free, and may hold old bytes.

        Raises
        ------
        ValueError
            Parts overlap, or lie outside the file.
        """
        end, self.gaps = 0, []
        for start, size in parts:
            if start < end or start % BLOCK or size < 1:
                raise ValueError("parts that overlap")
            if start > end:
                self.gaps.append((end, start - end))
            end = start + _blocks(size)
        self.end = _blocks(self.size)
        if end > self.end:
            raise ValueError("a part outside the file")
        if end < self.end:
            self.gaps.append((end, self.end - end))
        self.soiled = list(self.gaps)

    def put(self, part: memoryview) -> int:
        """Write a part where there is room; it is on the disk after `flush`. Where it begins."""
        size = _blocks(len(part))
        for i, (start, room) in enumerate(self.gaps):
            if room >= size:
                self.gaps[i : i + 1] = [(start + size, room - size)] if room > size else []
                break
        else:
            start, size = self._grow(size)
        self.unflushed = True
        try:
            self._write(part, start)
            self._write(memoryview(bytes(size - len(part))), start + len(part))  # a block keeps nothing of its past
        except BaseException:
            self.free(start, len(part))
            raise
        return start

    def fits_before(self, start: int, size: int) -> bool:
        """Whether `put` would find room for `size` bytes before `start`."""
        return any(room >= _blocks(size) for place, room in self.gaps if place < start)

    def get(self, start: int, into: np.ndarray) -> bool:
        """Fill `into`, uint8 (bytes,), from `start` on; False where the file ends before."""
        room, filled = into.data, 0
        with self._errors():
            while filled < len(room):
                read = os.preadv(self.descriptor, [room[filled:]], start + filled)
                if read == 0:
                    return False
                filled += read
        return True

    def flush(self) -> None:
        """Have the disk take what was put."""
        if self.unflushed:
            with self._errors():
                _flush(self.descriptor)
            self.unflushed = False

    def free(self, start: int, size: int) -> None:
        """Let a part's room be used again. Only once the database has committed to it."""
        gap = start, _blocks(size)
        self.soiled.append(gap)
        i = bisect.bisect(self.gaps, gap)
        if i < len(self.gaps) and gap[0] + gap[1] == self.gaps[i][0]:
            gap = gap[0], gap[1] + self.gaps.pop(i)[1]
        if i and sum(self.gaps[i - 1]) == gap[0]:
            before = self.gaps.pop(i - 1)
            i, gap = i - 1, (before[0], before[1] + gap[1])
        self.gaps.insert(i, gap)

    def wipe(self) -> None:
        """Give free room at the end back to the file system, overwrite all other that holds old bytes, and flush."""
        with self._errors():
            if self.gaps and sum(self.gaps[-1]) == self.end:
                self.end, _ = self.gaps.pop()
            if self.size > self.end:
                os.ftruncate(self.descriptor, self.end)
            zeros = memoryview(bytes(1 << 20))
            for start, length in _common(_merged(self.soiled), self.gaps):
                for place in range(start, start + length, len(zeros)):
                    self._write(zeros[: min(len(zeros), start + length - place)], place)
            _flush(self.descriptor)
        self.soiled, self.unflushed = [], False

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def _grow(self, size: int) -> tuple[int, int]:
        """Room for `size` bytes at the end, with zeros beyond it for later, if the disk has space for them.

        The zeros are written by a commit that waits for them, so there are few, and none beyond a part as large.
        """
        last = self.gaps[-1] if self.gaps and sum(self.gaps[-1]) == self.end else None
        start = self.end if last is None else last[0]
        grown = min(max(self.end // 2, LEAST_GROWTH), MOST_GROWTH) // BLOCK * BLOCK if size < MOST_GROWTH else 0
        try:
            self._write(memoryview(bytes(grown)), start + size)
        except StoreError:
            grown = 0
        if last is not None:
            self.gaps.pop()
        self.end = start + size + grown
        if grown:
            self.gaps.append((start + size, grown))
        return start, size

    def _write(self, part: memoryview, start: int) -> None:
        with self._errors():
            write_at(self.descriptor, part, start)

    def _errors(self) -> _Errors:
        return _Errors(self.path)


class _Errors:
    """Turns the system's errors into perdure's."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileError):
            remedy = "Check the disk's space and permissions, and try again."
            raise StoreError(str(self.path), "a disk that works", str(error), remedy) from error


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _merged(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    made: list[tuple[int, int]] = []
    for start, size in sorted(gaps):
        if made and start <= sum(made[-1]):
            made[-1] = made[-1][0], max(sum(made[-1]), start + size) - made[-1][0]
        else:
            made.append((start, size))
    return made


def _common(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What two lists of disjoint, sorted (start, size) have in common."""
    made, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        start, end = max(some[i][0], others[j][0]), min(sum(some[i]), sum(others[j]))
        if start < end:
            made.append((start, end - start))
        if sum(some[i]) < sum(others[j]):
            i += 1
        else:
            j += 1
    return made


def _flush(descriptor: int) -> None:
    try:
        import fcntl

        full: int = fcntl.F_FULLFSYNC  # type: ignore[attr-defined]  # macOS: only this reaches the disk
    except (ImportError, AttributeError):
        getattr(os, "fdatasync", os.fsync)(descriptor)
    else:
        fcntl.fcntl(descriptor, full)
