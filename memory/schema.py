"""What a store's database looks like, and how one is met in which nothing is taken on trust."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..backends.errors import FileError, StoreError
from .disk import SAFELY
from .record import LARGEST_HEAD

VERSION = 1
APPLICATION = 0x50455244  # "PERD", in the header of the file
FILE = "store.sqlite"
OLDEST_SQLITE = (3, 31)  # the first with trusted_schema
SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE memories (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, about BLOB NOT NULL,"
    " epoch INTEGER NOT NULL, records INTEGER NOT NULL, bytes INTEGER NOT NULL, stale INTEGER NOT NULL,"
    " chain BLOB NOT NULL, digest BLOB NOT NULL)",
    "CREATE TABLE records (memory INTEGER NOT NULL, number INTEGER NOT NULL, part INTEGER NOT NULL, head BLOB,"
    " size INTEGER NOT NULL, start INTEGER, body BLOB, PRIMARY KEY (memory, number, part))",
)
PRAGMAS = (
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "mmap_size = 0",
    "temp_store = MEMORY",
    "secure_delete = ON",
    "synchronous = FULL",
    "fullfsync = ON",
    "checkpoint_fullfsync = ON",
    "wal_autocheckpoint = 0",
    "busy_timeout = 5000",
)


def connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """A connection to the database at `path`, for one thread at a time; it may make the file, unless `readonly`.

    Raises
    ------
    StoreError
        An SQLite that is too old.
    OSError, sqlite3.Error
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise StoreError("sqlite3", "SQLite 3.31 or newer", sqlite3.sqlite_version, "Use a newer Python build.")
    place = f"file:{quote(os.fsencode(path.absolute()))}"
    if not readonly:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | SAFELY, 0o600))  # SQLite would let others read it
    elif not path.with_name(FILE + "-wal").exists() and not os.access(path.parent, os.W_OK):
        return _connected(f"{place}?mode=ro&immutable=1")  # no log, and nothing can be made beside it
    return _connected(f"{place}?mode={'ro' if readonly else 'rw'}")


def _connected(place: str) -> sqlite3.Connection:
    return sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False, timeout=5)


def settle(connection: sqlite3.Connection, folder: Path, readonly: bool) -> bool:
    """Set the connection so that a hostile schema can do nothing, and refuse all but ours; whether `create` is next.

    Raises
    ------
    FileError
        Another database, or one of a newer version.
    StoreError
        A file system without what the log needs, or another program has it open.
    sqlite3.Error
    """
    if hasattr(connection, "setconfig"):  # Python 3.12
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)  # type: ignore[attr-defined]
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2 * LARGEST_HEAD)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)

    def asked(pragma: str) -> Any:
        return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

    if not readonly and asked("page_count") == 0:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    version, application = asked("user_version"), asked("application_id")
    if application == APPLICATION and version > VERSION:
        newer = f"version {version}, written by a newer perdure"
        raise FileError(str(folder), f"store version {VERSION} or older", newer, "Upgrade perdure to open it.")
    found = _schema(connection)
    if not found and not version and not readonly:  # new, or killed while it was made
        if asked("journal_mode = WAL") != "wal":
            raise StoreError(str(folder), "a file system that SQLite can log on", "another", "Use a local disk.")
        return True
    if application != APPLICATION or version != VERSION or found != _expected():
        raise FileError(str(folder), "a store made by perdure.open", "another database", "Check the path.")
    if not readonly and asked("journal_mode = WAL") != "wal":
        raise StoreError(str(folder), "a store no other program has open", "one in use", "Close the other.")
    return False


def create(connection: sqlite3.Connection) -> None:
    """Make the tables, inside a transaction."""
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _schema(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()


def _expected() -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(":memory:")
    try:
        for statement in SCHEMA:
            connection.execute(statement)
        return _schema(connection)
    finally:
        connection.close()
