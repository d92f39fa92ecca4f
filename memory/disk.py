"""What is done to files here, and in which order: regular files only, and nothing half written under a final name."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..backends.errors import FileError

# Flags with which to open: no link is followed, no pipe waited for, nothing left open in another program.
SAFELY = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def as_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path.

    Raises
    ------
    FileError
        Not the path of anything, or a system without the calls that durability needs.
    """
    if not hasattr(os, "preadv"):
        raise FileError("path", "Linux or macOS", sys.platform, "Keep the memory's state_dict yourself here.")
    try:
        made = Path(path)
        os.fsencode(made)
    except (TypeError, ValueError) as error:
        raise FileError("path", "a path", repr(path)[:200], "Pass a str or a Path.") from error
    if "\0" in str(made) or not os.fspath(path):
        raise FileError("path", "a path", repr(path)[:200], "A path is not empty, and holds no NUL character.")
    return made.absolute()  # the process may go elsewhere while a store is open


def refuse_odd(path: Path, missing_ok: bool = False) -> None:
    """Refuse what is there under `path` unless it is a regular file: symbolic links, pipes, devices, folders.

    Raises
    ------
    FileError
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError as error:
        if missing_ok:
            return
        raise FileError(str(path), "a file", "nothing there", "Check the path.") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise FileError(str(path), "a regular file", _nature(mode), "Links, pipes, devices and folders are refused.")


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """A descriptor of the regular file at `path`, open for reading, and the file's size.

    Never blocks, follows no symbolic link, and looks at the descriptor itself, so swapping the file gains nothing.

    Raises
    ------
    FileError
    """
    refuse_odd(path)  # before opening: to open a device may already act on it
    try:
        descriptor = os.open(path, os.O_RDONLY | SAFELY)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FileError(str(path), "a regular file", _nature(found.st_mode), "It changed while it was opened.")
        yield descriptor, found.st_size
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place for the new file; where the block ends well, it is on the disk under `path`, and else nothing changed.

    The order is: write, flush the file, rename, flush the folder. A process killed on the way leaves behind at most a
    folder `.NAME.*.saving`, which may be deleted; of a long name, its first 50 characters.

    Raises
    ------
    FileError
    """
    refuse_odd(path, missing_ok=True)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:50]}.", suffix=".saving", dir=path.parent))
        new = folder / "new"
        yield new
        descriptor = os.open(new, os.O_RDWR | SAFELY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(new, path)
        sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(str(path), "a file that can be written", str(error), "Check space and permissions.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def made_folder(path: Path, create: bool) -> None:
    """There is a folder at `path`, no link to one; where there is nothing and `create`, make one, for its owner only.

    Raises
    ------
    FileError
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError as error:
        if not create:
            raise FileError(str(path), "a folder", "nothing there", "Check the path.") from error
        try:
            os.mkdir(path, 0o700)
            sync_folder(path.absolute().parent)
        except OSError as failure:
            raise FileError(str(path), "a folder that can be made", str(failure), "Check the path.") from failure
        return
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISDIR(mode):
        raise FileError(str(path), "a folder", _nature(mode), "Name the folder of a store.")


def write_at(descriptor: int, part: memoryview, start: int) -> None:
    """Write all of `part` from `start` on; the system may take it in pieces."""
    while part:
        written = os.pwrite(descriptor, part, start)
        part, start = part[written:], start + written


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (where folders can be flushed: not on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unreadable(path: Path, error: OSError) -> FileError:
    """The error of a file that cannot be opened."""
    return FileError(str(path), "a file that can be read", str(error), "Check the path and its permissions.")


def _nature(mode: int) -> str:
    natures = {
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISDIR: "a folder",
        stat.S_ISREG: "a file",
    }
    return next((name for test, name in natures.items() if test(mode)), "a device or socket")
