"""`perdure` on the command line: one module a command, and one line where something is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..backends.errors import PerdureError
from . import bench_command, demo, fit_command, info, search_command

# each has add_parser(subparsers), which sets `run`, a function of the parsed arguments
COMMANDS = (demo, fit_command, search_command, bench_command, info)
WRONG, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message}. Try {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None, version: str = "") -> int:
    """Run one command; the exit code is 0, 2 where the input was wrong, or 130 where the user interrupted.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; those of the process by default.
    version : str
        perdure's, for --version and info.
    """
    parser = Parser(prog="perdure", description="Long-term memory for any model.")
    parser.add_argument("--version", action="version", version=f"perdure {version}")
    parser.set_defaults(version=version)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except PerdureError as error:
        print(f"perdure {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG
    except MemoryError as error:
        print(f"perdure {arguments.command}: not enough memory. {error}".rstrip(), file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"perdure {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, as a rule
        print(f"perdure {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG
    return 0
