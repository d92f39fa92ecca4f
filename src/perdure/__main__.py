"""`python -m perdure` is the command `perdure`."""

import sys
from collections.abc import Sequence

from perdure import __version__
from perdure.bindings import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv`, by default that of the process; returns the exit code."""
    return cli.main(argv, __version__)


if __name__ == "__main__":
    sys.exit(main())
