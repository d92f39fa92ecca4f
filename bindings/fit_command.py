"""`perdure fit`: a signal fitted to the numbers of a CSV or NPY file."""

from __future__ import annotations

import argparse
import stat
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.errors import ArgumentError, FileError
from ..core import checks
from ..core.basis import gaussian_basis
from ..core.positions import centred, fraction
from ..core.signal import Signal, fit, penalty
from ..memory.continuous import ContinuousMemory

LARGEST = 2**30  # bytes of a file that is read at all


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `perdure`."""
    parser = subparsers.add_parser("fit", help="fit a continuous signal to a CSV or NPY file")
    parser.add_argument("file", help="one sample a row: CSV (a header is skipped), or NPY of shape (L,) or (L, e)")
    parser.add_argument("--basis", default="128", metavar="N", help="basis functions (%(default)s)")
    parser.add_argument("--ridge", default="gcv", help='relative penalty, or "gcv" to find it (%(default)s)')
    parser.add_argument("--segment", metavar="L", help="read the file as a stream, L samples at a time, into a memory")
    parser.add_argument("--contraction", default="0.75", help="what each segment leaves of the room (%(default)s)")
    parser.add_argument("--out", metavar="NPY", help="save the coefficients (N, e)")
    parser.add_argument("--plot", metavar="PNG", help="save a picture of the signal against its samples")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fit, print what came of it, and save what was asked for."""
    n = _whole("--basis", arguments.basis)
    segment = None if arguments.segment is None else _whole("--segment", arguments.segment)
    ridge = arguments.ridge if arguments.ridge == "gcv" else penalty(arguments.ridge)
    contraction = fraction("--contraction", arguments.contraction)
    for option in ("out", "plot"):
        _writable(f"--{option}", getattr(arguments, option))
    x = read_samples(Path(arguments.file))
    start = time.perf_counter()
    if segment is None:
        signal = fit(x, gaussian_basis(n), ridge)
        print(summary(signal, x, time.perf_counter() - start))
    else:
        memory = stream(x, n, 1e-3 if ridge == "gcv" else ridge, contraction, segment)
        signal = memory.signal
        signal = Signal(signal.coefficients[0], signal.basis, signal.ridge, signal.dtype, segment)
        print(f"{len(x)} samples of {x.shape[1]} in {time.perf_counter() - start:.2f} s, {memory.nbytes} bytes")
        print(memory.report())
    if arguments.out:
        with open(arguments.out, "wb") as target:
            np.save(target, signal.coefficients)
        print(f"coefficients saved: {arguments.out}")
    if arguments.plot:
        from . import plot

        picture = plot.signal(signal, x) if segment is None else plot.retained(memory)
        picture.savefig(arguments.plot, dpi=130)
        print(f"plot saved: {arguments.plot}")


def summary(signal: Signal, x: np.ndarray, seconds: float) -> str:
    """What a fit amounts to, in a few lines."""
    left = x - signal(centred(len(x)))
    size = float(np.linalg.norm(x - x.mean(axis=0))) or 1.0
    lines = [
        f"{len(x)} samples of {x.shape[1]} on {len(signal.basis)} functions in {seconds:.2f} s",
        f"ridge {signal.ridge:.3g}, degrees of freedom {signal.report().degrees_of_freedom:.1f}",
        f"residual {float(np.sqrt(np.mean(left**2))):.4g} (root mean square), "
        f"{100 * float(np.linalg.norm(left)) / size:.2f} % of the deviation from the mean",
    ]
    return "\n".join(lines)


def stream(x: np.ndarray, n: int, ridge: float, contraction: float, segment: int) -> ContinuousMemory:
    """A memory that has read x segment by segment, with a bar on a terminal."""
    memory = ContinuousMemory(
        1, x.shape[1], n, contraction, ridge, sticky=False, samples=max(n, 512), segment=segment, dtype="float64"
    )
    for first in range(0, len(x), segment):
        memory.write(x[None, first : first + segment])
        if sys.stderr.isatty():
            done = min(first + segment, len(x)) / len(x)
            print(f"\r{'█' * int(40 * done):40} {100 * done:3.0f} %", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return memory


def read_samples(path: Path) -> np.ndarray:
    """The numbers of a file as float64 (L, e), one sample a row.

    Raises
    ------
    FileError
        Not a readable regular file of finite numbers.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError("file", "a regular file", f"{path}, which is a folder, pipe or device", "Name a file.")
        if status.st_size > LARGEST:
            raise FileError("file", f"at most {LARGEST} bytes", f"{status.st_size}", "Split it.")
        with path.open("rb") as source:
            x = np.load(source, allow_pickle=False) if source.read(6) == b"\x93NUMPY" and not source.seek(0) else None
        if x is None:
            x = _read_csv(path)
        x = np.asarray(x, np.float64)
    except FileError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError("file", "a readable file", f"{path} ({reason})", "Check the path.") from error
    except (ValueError, TypeError, EOFError) as error:
        raise FileError(
            "file", "a CSV or NPY file of numbers", f"{path} ({error})", "See perdure fit --help."
        ) from error
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or 0 in x.shape:
        raise FileError(
            "file", "numbers of shape (L,) or (L, e)", f"{path} of shape {x.shape}", "Give one sample a row."
        )
    if not np.isfinite(x).all():
        raise FileError("file", "finite numbers", f"{path}, which holds NaN or infinity", "Clean it first.")
    return x


def _read_csv(path: Path) -> np.ndarray:
    """Rows of numbers separated by commas, semicolons, tabs or blanks; a first line that holds none is a header."""
    with path.open(encoding="utf-8-sig") as source:
        lines = [line.strip() for line in source]
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


def _whole(argument: str, text: str) -> int:
    try:
        return checks.count(argument, int(text))
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError(argument, "a whole number", repr(text), f"Pass {argument} 128.") from error


def _writable(argument: str, name: str | None) -> None:
    """Raise before any work where the folder of an output is missing."""
    if name is not None and not Path(name).resolve().parent.is_dir():
        raise FileError(argument, "a path in an existing folder", name, "Make the folder first.")
