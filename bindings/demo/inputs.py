"""What the demo is asked to do, checked before anything slow happens."""

from __future__ import annotations

import argparse
import codecs
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...backends.errors import ArgumentError, FileError
from ..arguments import whole_number, whole_numbers

TOKENS, MEMORY, LAYERS, FOLDER = 4096, "1024,2048,4096", "all", "demo-output"
WINDOW = 512
DEFAULT_FILE = "mailbox.py"  # its parts resemble one another: five formats, each with the same methods
BYTES_PER_TOKEN = 64  # far more than any text needs: how much of a large file is read


@dataclass(frozen=True)
class Document:
    """A text and what to call it."""

    name: str
    text: str


@dataclass(frozen=True)
class Settings:
    """The demo's arguments, checked.

    Attributes
    ----------
    file : Path
    tokens, window, k : int
    memory : tuple of int
        Sizes in tokens, ascending.
    layers : tuple of int, or "all"
    output : Path
        Folder of the plot.
    """

    file: Path
    tokens: int
    memory: tuple[int, ...]
    layers: Literal["all"] | tuple[int, ...]
    k: int
    output: Path
    window: int = WINDOW

    @classmethod
    def parsed(cls, arguments: argparse.Namespace) -> Settings:
        """Settings from the command line.

        Raises
        ------
        ArgumentError, FileError
        """
        layers = arguments.layers.strip()
        output = Path(arguments.output)
        if not arguments.output.strip():
            raise FileError("--output", "a folder", "an empty name", "Pass --output . for the folder you are in.")
        if output.exists() and not output.is_dir():
            raise FileError("--output", "a folder", f"{output}, which is a file", "Name another folder.")
        return cls(
            file=Path(arguments.file) if arguments.file is not None else default_file(),
            tokens=whole_number("--tokens", arguments.tokens, least=2 * WINDOW),
            memory=tuple(sorted(whole_numbers("--memory", arguments.memory, least=1))),
            layers="all" if layers == "all" else whole_numbers("--layers", layers, least=0),
            k=whole_number("--k", arguments.k, least=1),
            output=output,
        )

    def fits(self, depth: int) -> None:
        """A model of `depth` layers has every one of `layers`.

        Raises
        ------
        ArgumentError
        """
        if self.layers != "all" and max(self.layers) >= depth:
            remedy = "Pass --layers all, or numbers separated by commas."
            expected = f"'all' or layers from 0 to {depth - 1}"
            raise ArgumentError("--layers", expected, str(max(self.layers)), remedy)

    def document(self) -> Document:
        """As much of the file as `tokens` can need.

        Raises
        ------
        FileError
            Missing, unreadable, no regular file, empty, or no UTF-8 text.
        """
        return Document(str(self.file), read_text(self.file, self.tokens * BYTES_PER_TOKEN))


def default_file() -> Path:
    """A long source file of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib")) / DEFAULT_FILE


def read_text(path: Path, limit: int) -> str:
    """The first `limit` bytes of a UTF-8 file as text; a character cut off at the limit is left out.

    Raises
    ------
    FileError
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileError(
                "--file", "a regular file", f"{path}, which is a folder, pipe or device", "Name a text file."
            )
        with path.open("rb") as stream:
            content = stream.read(min(limit, path.stat().st_size + 1))
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(
            "--file", "a readable file", f"{path} ({reason})", "Check the path and its permissions."
        ) from error
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=len(content) < limit)
    except UnicodeDecodeError as error:
        received = f"{path}, whose byte {error.start} is not"
        raise FileError("--file", "UTF-8 text", received, "Convert it, for example with iconv -t UTF-8.") from error
    if "\0" in text:
        raise FileError("--file", "UTF-8 text", f"{path}, which is binary", "Name a text file.")
    if not text.strip():
        raise FileError("--file", "a text", f"{path}, which is empty", "Name a longer text.")
    return text
