"""SQLite, opened so that nothing in a store's files is taken on trust and what is committed is on the disk.

Write-ahead log, synchronous=FULL: a commit appends to the log and flushes it, and the readers of other processes see
the last commit while the next is being written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.errors import FileError, StoreError
from . import schema
from .bodies import Bodies
from .disk import refuse_odd, sync_folder
from .record import PART
from .schema import FILE

INLINE = 16 << 10  # bytes; a larger part of a record lies in the file of bodies
MODULUS = 1 << 256
TIDY = 2  # times the bytes in use that the file of bodies may be long after a checkpoint
LARGEST_MOVE = 256 << 20  # bytes moved by one checkpoint
_DAMAGED = "Restore the store from a copy."


class Engine:
    """One connection to a store's database; its user makes sure that one thread uses it at a time."""

    def __init__(self, folder: Path, readonly: bool):
        self.folder, self.path, self.readonly = folder, folder / FILE, readonly
        self._placed: list[tuple[int, int]] = []  # parts put by the transaction under way
        self._released: list[tuple[int, int]] = []  # parts whose room is free once it is committed
        self._limbo: list[tuple[int, int]] = []  # parts of transactions that may or may not have been committed
        self._facts: dict[str, int] = {}  # what the transaction under way commits
        for end in ("", "-wal", "-shm", "-journal"):
            refuse_odd(folder / (FILE + end), missing_ok=bool(end) or not readonly)
        with self.errors():
            self.connection = schema.connect(self.path, readonly)
        with contextlib.ExitStack() as undone:
            undone.callback(self.connection.close)
            self.bodies = Bodies(folder, readonly)
            undone.callback(self.bodies.close)
            with self.errors():
                self._prepare()
                if not readonly:
                    self._map_bodies()
            undone.pop_all()

    def _map_bodies(self) -> None:
        query = "SELECT start, size FROM records WHERE start IS NOT NULL ORDER BY start"
        try:
            self.bodies.use(self.connection.execute(query))
        except (ValueError, TypeError) as error:
            raise self.damaged("parts that lie side by side") from error

    def _prepare(self) -> None:
        if schema.settle(self.connection, self.folder, self.readonly):
            with self.transaction():
                schema.create(self.connection)
                self.put_facts({"catalog": 0, "commits": 0, "ids": 0, "memories": 0})
            sync_folder(self.folder)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn SQLite's errors into perdure's."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            primary = (code or 0) & 0xFF
            if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or isinstance(error, sqlite3.DataError):
                raise FileError(str(self.path), "an undamaged store", str(error), _DAMAGED) from error
            if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreError(str(self.path), "a store no one holds", str(error), "Try again.") from error
            remedy = "Check the disk's space and permissions, and try again."
            raise StoreError(str(self.path), "a disk that works", str(error), remedy) from error
        except (OverflowError, UnicodeDecodeError) as error:
            raise FileError(str(self.path), "an undamaged store", str(error), _DAMAGED) from error
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise StoreError(
                str(self.path), "a disk that works", str(error), "Check the disk, and try again."
            ) from error

    @contextmanager
    def transaction(self, write: bool = True) -> Iterator[None]:
        """All inside happens, and where `write`, it is on the disk when the block has ended; or nothing happens."""
        placed: list[tuple[int, int]] = []
        released: list[tuple[int, int]] = []
        self._placed, self._released = placed, released
        with self.errors():
            self.connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                if write:
                    self.bodies.flush()  # before the commit that makes them count
            except BaseException:
                self._roll_back()
                for part in placed:
                    self.bodies.free(*part)
                raise
            try:
                self.connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                if not write or not self._landed():
                    self._limbo += placed  # after a crash the log may still turn out to hold the commit
                    raise
            if write:
                for part in (*released, *self._limbo):
                    self.bodies.free(*part)
                self._limbo = []

    def _roll_back(self) -> None:
        if self.connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # the error that brought us here says more
                self.connection.execute("ROLLBACK")

    def _landed(self) -> bool:
        """Whether a commit that raised is in the database all the same."""
        try:
            return self.facts() == self._facts
        except (sqlite3.Error, FileError):
            return False

    # ---- records -----------------------------------------------------------------------------------------------------

    def put_part(self, memory: int, number: int, part: int, head: bytes | None, body: memoryview) -> None:
        """Insert one part of a record, inside a transaction."""
        start = None
        if len(body) > INLINE:
            start = self.bodies.put(body)
            self._placed.append((start, len(body)))
        row = (memory, number, part, head, len(body), start, None if start is not None else body)
        self.connection.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def drop_records(self, memory: int) -> None:
        """Delete a memory's records, inside a transaction; their room is free once that is committed."""
        chosen = "FROM records WHERE memory = ?"
        self._released += self.connection.execute(f"SELECT start, size {chosen} AND start IS NOT NULL", (memory,))
        self.connection.execute(f"DELETE {chosen}", (memory,))

    def get(self, memory: int, number: int) -> tuple[bytes, np.ndarray]:
        """Head and body, uint8 (bytes,), of a record.

        Raises
        ------
        FileError
            Not all of it is there.
        """
        parts = self.connection.execute(
            "SELECT part, head, size, start, body FROM records WHERE memory = ? AND number = ? ORDER BY part",
            (memory, number),
        ).fetchall()
        sizes = [size for _, _, size, _, _ in parts]
        if not parts or not all(isinstance(size, int) and 0 <= size <= PART for size in sizes):
            raise self.damaged("every record")
        outside = sum(size for _, _, size, start, _ in parts if start is not None)
        held = all(isinstance(body, bytes) and len(body) == size for _, _, size, start, body in parts if start is None)
        if not held or outside > self.bodies.size or [row[0] for row in parts] != list(range(len(parts))):
            raise self.damaged("every part of a record")
        made, filled, head = np.empty(sum(sizes), np.uint8), 0, parts[0][1]
        for _, _, size, start, body in parts:
            room = made[filled : filled + size]
            if start is None:
                room[:] = np.frombuffer(body, np.uint8)
            elif not (isinstance(start, int) and 0 <= start < 1 << 62 and self.bodies.get(start, room)):
                raise self.damaged("every part of a record")
            filled += size
        if not isinstance(head, bytes):
            raise self.damaged("the head of a record")
        return head, made

    def record_bytes(self, memory: int, number: int) -> int:
        """Bytes of a record's head and body."""
        parts = "SELECT total(size) + total(length(head)) FROM records WHERE memory = ? AND number = ?"
        with self.errors():
            return int(self.connection.execute(parts, (memory, number)).fetchone()[0])

    def tidy(self, facts: dict[str, int]) -> bool:
        """Move parts from the end of the file of bodies to free room before them, until most of the file is in use.

        If any moved, the facts become `facts`, by which readers and a failed commit tell that it happened.
        """
        rows = self.connection.execute(
            "SELECT start, size, rowid FROM records WHERE start IS NOT NULL ORDER BY start DESC"
        ).fetchall()
        live, moved = sum(size for _, size, _ in rows), 0
        with self.transaction():
            for start, size, row in rows:
                if self.bodies.end <= TIDY * live or moved > LARGEST_MOVE or not self.bodies.fits_before(start, size):
                    break
                part = np.empty(size, np.uint8)
                if not self.bodies.get(start, part):
                    raise self.damaged("every part of a record")
                new = self.bodies.put(part.data)
                self._placed.append((new, size))
                self._released.append((start, size))
                self.connection.execute("UPDATE records SET start = ? WHERE rowid = ?", (new, row))
                moved += size
            if moved:
                self.put_facts(facts)
        return moved > 0

    # ---- the catalogue: what there is, under a digest of its own -----------------------------------------------------

    def facts(self) -> dict[str, int]:
        """Commits and ids so far, and number and sum of digests of the memories."""
        found = self.connection.execute("SELECT value FROM facts WHERE name = 'head'").fetchone()
        try:
            body, digest = found[0][:-32], found[0][-32:]
            if hashlib.sha256(body).digest() != digest:
                raise ValueError("no match")
            return json.loads(body)
        except (TypeError, ValueError) as error:
            raise self.damaged("a head that matches its checksum") from error

    def put_facts(self, facts: dict[str, int]) -> None:
        """Replace the facts, inside a transaction."""
        self._facts = dict(facts)
        body = json.dumps(facts, sort_keys=True).encode()
        self.connection.execute(
            "INSERT OR REPLACE INTO facts VALUES ('head', ?)", (body + hashlib.sha256(body).digest(),)
        )

    def catalogue(self) -> tuple[dict[str, int], list[tuple[Any, ...]]]:
        """The facts, and every row of the memories, verified; the columns are those of SCHEMA."""
        facts, total, rows = self.facts(), 0, []
        for row in self.connection.execute("SELECT * FROM memories ORDER BY id"):
            if row[-1] != row_digest(*row[:-1]):
                raise self.damaged("a memory's entry that matches its checksum")
            total += int.from_bytes(row[-1], "little")
            rows.append(row)
        if len(rows) != facts["memories"] or total % MODULUS != facts["catalog"]:
            raise self.damaged("a catalogue that matches its checksum")
        return facts, rows

    def damaged(self, expected: str) -> FileError:
        """The error of a store whose bytes are not what was written."""
        return FileError(str(self.path), expected, "something else", _DAMAGED)

    # ---- space -------------------------------------------------------------------------------------------------------

    def log_bytes(self) -> int:
        """Size of the write-ahead log's file."""
        try:
            return os.stat(self.folder / (FILE + "-wal")).st_size
        except FileNotFoundError:
            return 0

    def disk_bytes(self) -> int:
        """Size of all the store's files."""
        found = (self.folder / name for name in (FILE, FILE + "-wal", FILE + "-shm"))
        return self.bodies.size + sum(path.stat().st_size for path in found if path.exists())

    def move_log(self, truncate: bool) -> bool:
        """Carry the log over into the file; with `truncate`, empty it. False where a reader stood in the way."""
        with self.errors():
            mode = "TRUNCATE" if truncate else "PASSIVE"
            busy, *_ = self.connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            return not busy

    def shrink(self) -> None:
        """Return the database's free space to the file system."""
        with self.errors():
            self.connection.execute("PRAGMA incremental_vacuum").fetchall()

    def close(self) -> None:
        """Close the files; the last one to close the database carries its log over."""
        try:
            with self.errors():
                self.connection.close()
        finally:
            self.bodies.close()


def row_digest(*row: Any) -> bytes:
    """The digest of a memory's entry, the last column aside."""
    made = hashlib.sha256()
    for field in row:
        text = field if isinstance(field, bytes) else repr(field).encode()
        made.update(len(text).to_bytes(8, "little") + text)
    return made.digest()
