"""Arguments of the command line, checked before any work: every mistake is one of our errors, in one line."""

from __future__ import annotations

import os
from pathlib import Path

from ..backends.errors import ArgumentError, FileError
from ..core import checks


def whole_number(argument: str, text: str, least: int = 1) -> int:
    """`text` as a whole number of at least `least`.

    Raises
    ------
    ArgumentError
    """
    try:
        return checks.count(argument, int(text), least)
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(argument, "a whole number", repr(text)[:80], f"Pass {argument} {least}.") from error


def whole_numbers(argument: str, text: str, least: int = 1) -> tuple[int, ...]:
    """Whole numbers separated by commas, without repetition.

    Raises
    ------
    ArgumentError
    """
    return tuple(dict.fromkeys(whole_number(argument, part.strip(), least) for part in text.split(",")))


def file_to_write(argument: str, name: str | None) -> None:
    """Somewhere a file can be written: no folder, and in one that exists; None is skipped.

    Raises
    ------
    FileError
    """
    if name is None:
        return
    path = Path(name)
    if path.is_dir():
        raise FileError(argument, "a file", f"{name}, which is a folder", "Add a file's name.")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileError(argument, "a path in an existing folder", name, "Make the folder first.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise FileError(argument, "a file that can be written", name, "Check its permissions.")


def other_file(argument: str, name: str | None, read: str) -> None:
    """A file to write that is not the one that is read; None is skipped.

    Raises
    ------
    FileError
    """
    if name is not None and Path(name).exists() and Path(read).exists() and Path(name).samefile(read):
        raise FileError(argument, "another file than the one that is read", name, "Name another file.")


def folder_to_write(argument: str, folder: Path) -> None:
    """Make `folder` unless it is there.

    Raises
    ------
    FileError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        received = f"{folder} ({error.strerror})"
        raise FileError(argument, "a folder to write to", received, "Name another folder.") from error
    if not os.access(folder, os.W_OK):
        raise FileError(argument, "a folder to write to", f"{folder} (Permission denied)", "Name another folder.")
