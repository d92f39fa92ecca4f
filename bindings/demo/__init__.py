"""`perdure demo`: a real pretrained model reads a real long document, without memory and with perdure's."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ...backends.arrays import optional_import
from ..arguments import folder_to_write
from .inputs import FOLDER, LAYERS, MEMORY, TOKENS, Settings


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `perdure`."""
    parser = subparsers.add_parser(
        "demo",
        help="a real model reads a long document, with and without memory",
        description="SmolLM2-135M reads a long document 512 tokens at a time, without memory, with perdure memory of "
        "several sizes, and beside the usual baselines; prints a table and what was remembered, and saves a plot.",
    )
    parser.add_argument("--file", metavar="PATH", help="a UTF-8 text; by default a long source file of this Python")
    parser.add_argument("--tokens", default=str(TOKENS), metavar="N", help="how much of it to read (%(default)s)")
    parser.add_argument("--memory", default=MEMORY, metavar="SIZES", help="memory sizes in tokens (%(default)s)")
    parser.add_argument("--layers", default=LAYERS, metavar="all|0,5,9", help="layers that remember (%(default)s)")
    parser.add_argument("--k", default="32", help="memories each query attends to (%(default)s)")
    parser.add_argument("--output", default=FOLDER, metavar="DIR", help="where the plot is saved (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check the arguments, load the model, read, and report.

    Raises
    ------
    PerdureError
        Whatever is wrong with the input, before anything slow is done where possible.
    """
    settings = Settings.parsed(arguments)
    document = settings.document()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else PyTorch's threads spin while they wait for shared cores
    for module, extra in (("torch", "transformers"), ("transformers", "transformers"), ("matplotlib.figure", "plot")):
        optional_import(module, extra)
    from ..pretrained import LAYERS as DEPTH
    from ..pretrained import smollm2
    from .show import show

    settings.fits(DEPTH)
    folder_to_write("--output", settings.output)

    print("loading SmolLM2-135M (the first time it is unpacked into the cache folder, which takes longer)", flush=True)
    show(smollm2(), document, settings)
