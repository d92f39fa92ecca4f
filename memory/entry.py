"""What a store knows of one of its memories."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import numpy as np

from ..backends.errors import ArgumentError, StoreError
from .guard import Guard
from .ledger import Place
from .record import Record

LONGEST_NAME = 1024  # bytes of UTF-8


class Entry:
    """A memory's place on the disk, the calls that wait for a commit, and, while it is open, the memory itself."""

    def __init__(self, name: str, about: dict[str, Any], place: Place | None, guard: Guard | None):
        self.name, self.about, self.guard = name, about, guard
        self.waiting: list[Record] = []  # calls since the last commit
        self.waiting_bytes = 0
        self.lies(place)
        self.whole = place is None  # the next commit writes the state, not the calls
        self.touched = place is None  # something waits for a commit
        self.deleted = False
        self.home: dict[str, Any] = {}  # arguments of `to`: where the memory is held while it is open
        self.held = 0  # bytes in main memory, as last counted by the shelf
        self.counted = 0, 0  # bytes and waiting bytes, as last counted by the quota
        self.changing = 0  # calls under way that may change what the commit writes
        self.lock = threading.Lock()  # the one writer's; guards all of the above but what is counted

    def lies(self, place: Place | None) -> None:
        """Its place on the disk; `bytes` are those it takes there once what waits is committed, at most."""
        self.place = place
        self.bytes = (place.size if place is not None else 0) + self.waiting_bytes

    def alive(self) -> None:
        """Refuse a memory that was deleted.

        Raises
        ------
        StoreError
        """
        if self.deleted:
            raise StoreError(
                f"memory {self.name!r}", "one that is in the store", "one that was deleted", "Get another."
            )

    def agree(self, kind: str | None, config: dict[str, Any]) -> None:
        """Refuse to be taken for another kind of memory, or for one made with other arguments.

        Raises
        ------
        ArgumentError
        """
        there = {"kind": self.about["kind"], **self.about["config"]}
        for argument, value in comparable({**config, "kind": kind}).items():
            if argument not in there or (value is not None and there[argument] != value):
                raise ArgumentError(
                    argument,
                    f"{there.get(argument, 'no such argument')!r}, as {self.name!r} was made with",
                    repr(value)[:200],
                    "Leave it out, or choose another name.",
                )


def encoded(name: str, argument: str = "name") -> bytes:
    """The name of a memory as it is stored; or of another thing, as `argument` says.

    Raises
    ------
    ArgumentError
    """
    try:
        made = name.encode()
    except (AttributeError, UnicodeEncodeError):
        made = b""
    if not 0 < len(made) <= LONGEST_NAME:
        raise ArgumentError(argument, f"a text of 1 to {LONGEST_NAME} bytes", repr(name)[:200], "Choose another.")
    return made


def clipping(clip: float | None) -> float | None:
    """A clip that means something.

    Raises
    ------
    ArgumentError
    """
    fits = isinstance(clip, int | float) and not isinstance(clip, bool) and math.isfinite(clip) and clip > 1
    if clip is not None and not fits:
        raise ArgumentError("clip", "a number above 1, or None", repr(clip), "Pass clip=1.5.")
    return None if clip is None else float(clip)


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments a memory was made with, as JSON keeps them; what JSON does not know, as its representation."""
    return json.loads(json.dumps(config, default=_plain))


def _plain(argument: Any) -> Any:
    number = isinstance(argument, np.generic) and argument.dtype.kind in "biuf"
    return argument.item() if number else repr(argument)
