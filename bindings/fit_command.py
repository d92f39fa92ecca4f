"""`perdure fit`: a signal fitted to the numbers of a CSV or NPY file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.errors import ArgumentError
from ..core import checks
from ..core.basis import gaussian_basis
from ..core.positions import centred
from ..core.signal import Signal, fit, penalty
from ..memory.continuous import ContinuousMemory
from .arguments import file_to_write, other_file, whole_number
from .samples import read_samples

PICTURES = (".png", ".svg", ".pdf", ".jpg")
STREAMED = 1e-3  # relative penalty of a stream, of which no part knows the rest


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `perdure`."""
    parser = subparsers.add_parser("fit", help="fit a continuous signal to a CSV or NPY file")
    parser.add_argument("file", help="one sample a row: CSV (a header is skipped), or NPY of shape (L,) or (L, e)")
    parser.add_argument("--basis", default="128", metavar="N", help="basis functions (%(default)s)")
    ridge = f'relative penalty, or "gcv" to find it (gcv; {STREAMED:g} with --segment, which cannot find it)'
    parser.add_argument("--ridge", help=ridge)
    parser.add_argument("--segment", metavar="L", help="read the file as a stream, L samples at a time, into a memory")
    parser.add_argument("--contraction", default="0.75", help="what each segment leaves of the room (%(default)s)")
    parser.add_argument("--out", metavar="NPY", help="save the coefficients (N, e)")
    parser.add_argument("--plot", metavar="PNG", help="save a picture of the signal against its samples")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fit, print what came of it, and save what was asked for."""
    n = whole_number("--basis", arguments.basis)
    segment = None if arguments.segment is None else whole_number("--segment", arguments.segment)
    ridge: Any = ("gcv" if segment is None else STREAMED) if arguments.ridge is None else arguments.ridge
    if ridge == "gcv" and segment is not None:
        raise ArgumentError("--ridge", "a number with --segment", "gcv", f"Pass --ridge {STREAMED:g}, or all at once.")
    ridge = ridge if ridge == "gcv" else penalty(ridge)
    contraction = checks.number("--contraction", arguments.contraction, 0, 1)
    for option in ("out", "plot"):
        file_to_write(f"--{option}", getattr(arguments, option))
        other_file(f"--{option}", getattr(arguments, option), arguments.file)
    if arguments.plot and Path(arguments.plot).suffix.lower() not in PICTURES:
        raise ArgumentError("--plot", f"a name that ends in {', '.join(PICTURES)}", arguments.plot, "Name a picture.")
    x = read_samples("file", Path(arguments.file))
    start = time.perf_counter()
    if segment is None:
        signal = fit(x, gaussian_basis(n), ridge)
        print(summary(signal, x, time.perf_counter() - start))
    else:
        memory = stream(x, n, ridge, contraction, segment)
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
        f"ridge {signal.ridge:.3g}, degrees of freedom {signal.degrees_of_freedom:.1f}",
        f"residual {float(np.sqrt(np.mean(left**2))):.4g} (root mean square), "
        f"{100 * float(np.linalg.norm(left)) / size:.2f} % of the deviation from the mean",
    ]
    return "\n".join(lines)


def stream(x: np.ndarray, n: int, ridge: float, contraction: float, segment: int) -> ContinuousMemory:
    """A memory that has read x segment by segment, with a bar on a terminal."""
    memory = ContinuousMemory(1, x.shape[1], n, contraction, ridge, sticky=False, segment=segment, dtype="float64")
    for first in range(0, len(x), segment):
        memory.write(x[None, first : first + segment])
        if sys.stderr.isatty():
            done = min(first + segment, len(x)) / len(x)
            print(f"\r{'█' * int(40 * done):40} {100 * done:3.0f} %", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return memory
