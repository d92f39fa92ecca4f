"""SQLite, opened so that nothing in a store's files is taken on trust and what is committed is on the disk.

Write-ahead log, synchronous=FULL: a commit appends to the log and flushes it, and the readers of other processes see
the last commit while the next is being written.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..backends.errors import FileError, StoreError
from .disk import refuse_odd, sync_folder
from .record import PART

VERSION = 1
APPLICATION = 0x50455244  # "PERD", in the header of the file
FILE, LOCK = "store.sqlite", "lock"
PAGE = 65_536  # bytes; large pages make large records cheap: one frame of the log each
OLDEST_SQLITE = (3, 31)  # the first with trusted_schema
SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE memories (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, about BLOB NOT NULL,"
    " epoch INTEGER NOT NULL, records INTEGER NOT NULL, bytes INTEGER NOT NULL, stale INTEGER NOT NULL,"
    " chain BLOB NOT NULL, digest BLOB NOT NULL)",
    "CREATE TABLE records (memory INTEGER NOT NULL, number INTEGER NOT NULL, part INTEGER NOT NULL, head BLOB,"
    " body BLOB NOT NULL, PRIMARY KEY (memory, number, part))",
)
PRAGMAS = (
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "mmap_size = 0",
    "temp_store = MEMORY",
    "cache_size = -32768",
    "secure_delete = FAST",
    "synchronous = FULL",
    "fullfsync = ON",
    "checkpoint_fullfsync = ON",
    "wal_autocheckpoint = 0",
    "busy_timeout = 5000",
)
MODULUS = 1 << 256
_DAMAGED = "Restore the store from a copy."


class Engine:
    """One connection to a store's database; its user makes sure that one thread uses it at a time."""

    def __init__(self, folder: Path, readonly: bool):
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreError("sqlite3", "SQLite 3.31 or newer", sqlite3.sqlite_version, "Use a newer Python build.")
        self.folder, self.path, self.readonly = folder, folder / FILE, readonly
        for end in ("", "-wal", "-shm", "-journal"):
            refuse_odd(folder / (FILE + end), missing_ok=bool(end) or not readonly)
        mode = "ro" if readonly else "rwc"
        with self.errors():
            self.connection = sqlite3.connect(
                f"file:{quote(str(self.path.absolute()))}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=5,
            )
        try:
            with self.errors():
                self._prepare()
        except BaseException:
            self.connection.close()
            raise

    def _prepare(self) -> None:
        connection = self.connection
        if hasattr(connection, "setconfig"):  # Python 3.12
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4 * PART)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        new = not self.readonly and self._value("PRAGMA page_count") == 0
        if new:
            connection.execute(f"PRAGMA page_size = {PAGE}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        version, application = self._value("PRAGMA user_version"), self._value("PRAGMA application_id")
        if application == APPLICATION and version > VERSION:
            newer = f"version {version}, written by a newer perdure"
            raise FileError(str(self.folder), f"store version {VERSION} or older", newer, "Upgrade perdure to open it.")
        schema = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
        if not schema and not version and not self.readonly:  # new, or killed while it was made
            if self._value("PRAGMA journal_mode = WAL") != "wal":
                raise StoreError(
                    str(self.folder), "a file system that SQLite can log on", "another", "Use a local disk."
                )
            with self.transaction():
                for statement in SCHEMA:
                    connection.execute(statement)
                self.put_facts({"catalog": 0, "commits": 0, "ids": 0, "memories": 0})
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            sync_folder(self.folder)
        elif application != APPLICATION or version != VERSION or schema != _expected_schema():
            raise FileError(str(self.folder), "a store made by perdure.open", "another database", "Check the path.")
        elif not self.readonly and self._value("PRAGMA journal_mode = WAL") != "wal":
            raise StoreError(str(self.folder), "a store no other program has open", "one in use", "Close the other.")

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

    @contextmanager
    def transaction(self, write: bool = True) -> Iterator[None]:
        """All inside happens, and where `write`, it is on the disk when the block has ended; or nothing happens."""
        with self.errors():
            self.connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def _value(self, query: str) -> Any:
        return self.connection.execute(query).fetchone()[0]

    def put_part(self, memory: int, number: int, part: int, head: bytes | None, body: memoryview) -> None:
        """Insert one row of records, the body copied straight into the pages, which costs half of binding it."""
        row = (memory, number, part, head, len(body))
        inserted = self.connection.execute("INSERT INTO records VALUES (?, ?, ?, ?, zeroblob(?))", row)
        if body:
            with self.connection.blobopen("records", "body", inserted.lastrowid) as blob:
                blob.write(body)

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
        found = (self.folder / name for name in (FILE, FILE + "-wal", FILE + "-shm", LOCK))
        return sum(path.stat().st_size for path in found if path.exists())

    def move_log(self, truncate: bool) -> bool:
        """Carry the log over into the file; with `truncate`, empty it. False where a reader stood in the way."""
        with self.errors():
            mode = "TRUNCATE" if truncate else "PASSIVE"
            busy, *_ = self.connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            return not busy

    def give_back(self) -> None:
        """Return free pages to the file system; they have been overwritten with zeros when they became free."""
        with self.errors():
            self.connection.execute("PRAGMA incremental_vacuum").fetchall()

    def close(self) -> None:
        """Close the connection; the last one to be closed carries the log over."""
        with self.errors():
            self.connection.close()


def row_digest(*row: Any) -> bytes:
    """The digest of a memory's entry, the last column aside."""
    made = hashlib.sha256()
    for field in row:
        text = field if isinstance(field, bytes) else repr(field).encode()
        made.update(len(text).to_bytes(8, "little") + text)
    return made.digest()


def _expected_schema() -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(":memory:")
    try:
        for statement in SCHEMA:
            connection.execute(statement)
        return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
    finally:
        connection.close()


class WriterLock:
    """The right to write to a store, held by one process, and in it by one Store; the system frees it when it ends."""

    def __init__(self, folder: Path):
        path = folder / LOCK
        refuse_odd(path, missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
            flags |= getattr(os, name, 0)
        self.descriptor = os.open(path, flags, 0o600)
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
