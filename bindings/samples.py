"""Numbers from a file, one sample a row: what the command line's fit and search are given."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np

from ..backends.errors import FileError

LARGEST = 2**30  # bytes of a file that is read at all
NPY = b"\x93NUMPY"


def read_samples(argument: str, path: Path) -> np.ndarray:
    """The numbers of a CSV or NPY file as float64 (L, e), one sample a row.

    Raises
    ------
    FileError
        Not a readable regular file of finite numbers.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError(argument, "a regular file", f"{path}, which is a folder, pipe or device", "Name a file.")
        if status.st_size > LARGEST:
            raise FileError(argument, f"at most {LARGEST} bytes", f"{status.st_size}", "Split it.")
        with path.open("rb") as source:
            is_npy = source.read(len(NPY)) == NPY
            source.seek(0)
            x = np.asarray(np.load(source, allow_pickle=False) if is_npy else _csv(source.read()), np.float64)
    except FileError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(argument, "a readable file", f"{path} ({reason})", "Check the path.") from error
    except (ValueError, TypeError, EOFError) as error:
        expected = "a CSV or NPY file of numbers"
        raise FileError(argument, expected, f"{path} ({error})", "Give one sample a row.") from error
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or 0 in x.shape:
        expected = "numbers of shape (L,) or (L, e)"
        raise FileError(argument, expected, f"{path} of shape {x.shape}", "Give one sample a row.")
    if not np.isfinite(x).all():
        raise FileError(argument, "finite numbers", f"{path}, which holds NaN or infinity", "Clean it first.")
    return x


def _csv(content: bytes) -> np.ndarray:
    """Rows of numbers separated by commas, semicolons, tabs or blanks; a first line that holds none is a header."""
    lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    kept = (line.replace(";", ",").replace("\t", ",") for line in lines if line and not line.startswith("#"))
    rows = [line.split(",") if "," in line else line.split() for line in kept]
    if rows and not _is_number(rows[0][0]):
        rows = rows[1:]
    return np.array([[float(field) for field in row] for row in rows])


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
