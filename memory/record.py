"""One record of a store: a call of `write` or `clear`, or a whole state, as bytes that carry no code."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.arrays import common_framework, framework
from ..backends.errors import ArgumentError
from .file import DTYPES
from .state import Owned, as_numpy

ALIGNMENT = 64  # every array begins at a multiple of it, so that it can be used where it lies
PART = 8 << 20  # the most bytes stored in one piece
LARGEST_HEAD = 16 << 20
STATE = "state"
VERBS = ("write", "clear")  # what a record may ask of a memory
_NAMES = {dtype.str: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Record:
    """What was called, as JSON in which arrays are only described, and the arrays' bytes one after the other."""

    head: bytes
    body: bytes
    content: bytes  # the SHA-256 of both
    forgets: bool = False  # after this call, earlier records hold what should be gone

    @property
    def nbytes(self) -> int:
        """Bytes of head and body."""
        return len(self.head) + len(self.body)

    def parts(self) -> Iterator[memoryview]:
        """The body in pieces of at most PART bytes, at least one."""
        yield from cut(memoryview(self.body))


def encode(verb: str, arguments: dict[str, Any]) -> tuple[Record, dict[str, Any]]:
    """A call as a record, and its arguments in NumPy, as a replay of the record will see them.

    Raises
    ------
    ArgumentError
        An argument that is neither arrays nor JSON.
    FrameworkError
        Arrays of several frameworks or devices.
    """
    arrays: list[np.ndarray] = []
    given: dict[str, Any] = {}
    numbers = {name: _in_numpy(name, argument, given) for name, argument in arguments.items()}
    if given:
        common_framework(**given)
    tree = {name: _describe(argument, arrays) for name, argument in numbers.items()}
    head = json.dumps({"verb": verb, "arguments": tree}, separators=(",", ":")).encode()
    body = b"".join(_padded(arrays))
    return Record(head, body, digest(head, (body,)).digest(), verb == "clear"), numbers


def encode_state(state: dict[str, np.ndarray]) -> tuple[bytes, Iterator[memoryview]]:
    """A flat dict of arrays as head and pieces of a body, copied piece by piece only."""
    arrays = [np.ascontiguousarray(array) for array in state.values()]
    tree = {name: _describe(array, []) for name, array in zip(state, arrays, strict=True)}
    head = json.dumps({"verb": STATE, "arguments": tree}, separators=(",", ":")).encode()
    total = sum(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)
    return head, _filled(_padded(arrays), min(total, PART))


def decode(head: bytes, body: np.ndarray) -> tuple[str, dict[str, Any]]:
    """Verb and arguments of a record; arrays are views of `body`, a writable uint8 array (bytes,) that nobody else has.

    Raises
    ------
    ValueError, TypeError, KeyError, IndexError, RecursionError
        Not made by `encode`.
    """
    if len(head) > LARGEST_HEAD:
        raise ValueError("a head that large")
    made = json.loads(head)
    place = 0

    def build(tree: Any) -> Any:
        nonlocal place
        if isinstance(tree, list):
            return [build(part) for part in tree]
        if not isinstance(tree, dict):
            return tree
        if "tuple" in tree:
            return tuple(build(part) for part in tree["tuple"])
        if "dict" in tree:
            return {name: build(part) for name, part in tree["dict"].items()}
        dtype, shape = _NAMES[tree["array"]], tuple(tree["shape"])
        end = place + math.prod(shape) * dtype.itemsize
        if any(axis < 0 for axis in shape) or end > body.size:
            raise ValueError("an array larger than the record")
        array = body[place:end].view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
        place = -(-end // ALIGNMENT) * ALIGNMENT
        return array.view(Owned)

    verb, arguments = made["verb"], {name: build(tree) for name, tree in made["arguments"].items()}
    if verb not in (*VERBS, STATE) or place < body.size:
        raise ValueError(f"a record of {verb!r}, {body.size - place} bytes too long")
    return verb, arguments


def digest(head: bytes, parts: Iterable[memoryview | bytes]) -> hashlib._Hash:
    """The SHA-256 of a record, its head told from its body by its length; more of the body may follow."""
    made = hashlib.sha256(len(head).to_bytes(8, "little") + head)
    for part in parts:
        made.update(part)
    return made


def link(chain: bytes, memory: int, epoch: int, number: int, content: bytes) -> bytes:
    """The chain of digests with one more record: nothing can be left out, repeated, moved, or taken from elsewhere."""
    place = b"".join(n.to_bytes(8, "little") for n in (memory, epoch, number))
    return hashlib.sha256(chain + place + content).digest()


def cut(body: memoryview) -> Iterator[memoryview]:
    """`body` in pieces of at most PART bytes, at least one."""
    yield from (body[start : start + PART] for start in range(0, max(len(body), 1), PART))


def _in_numpy(name: str, argument: Any, given: dict[str, Any]) -> Any:
    """`argument` with every array in NumPy, and everything else as JSON gives it back; `given` collects the arrays."""
    if isinstance(argument, tuple | list):
        return type(argument)(_in_numpy(f"{name}[{i}]", part, given) for i, part in enumerate(argument))
    if isinstance(argument, dict):
        return {key: _in_numpy(key, part, given) for key, part in argument.items()}
    if isinstance(argument, np.generic):
        return argument.item()
    if isinstance(argument, range):
        return list(argument)
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    if framework(argument) is not None:
        given[name] = argument
        array = as_numpy(argument)
        if array.dtype.newbyteorder("<").str in _NAMES:
            return array
    raise ArgumentError(name, "arrays of numbers, or numbers", type(argument).__name__, "Convert it first.")


def _describe(argument: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(argument, np.ndarray):
        arrays.append(argument)
        return {"array": argument.dtype.newbyteorder("<").str, "shape": argument.shape}
    if isinstance(argument, tuple):
        return {"tuple": [_describe(part, arrays) for part in argument]}
    if isinstance(argument, list):
        return [_describe(part, arrays) for part in argument]
    if isinstance(argument, dict):
        return {"dict": {name: _describe(part, arrays) for name, part in argument.items()}}
    return argument


def _padded(arrays: list[np.ndarray]) -> Iterator[memoryview | bytes]:
    """The arrays' bytes, little-endian, each filled up to a multiple of ALIGNMENT."""
    for array in arrays:
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        yield little.reshape(-1).view(np.uint8).data
        yield bytes(-array.nbytes % ALIGNMENT)


def _filled(pieces: Iterable[memoryview | bytes], size: int) -> Iterator[memoryview]:
    """The same bytes in pieces of exactly `size` bytes, but for the last."""
    room, filled = bytearray(size), 0
    for whole in pieces:
        piece = memoryview(whole)
        while piece:
            taken = min(len(piece), size - filled)
            room[filled : filled + taken] = piece[:taken]
            piece, filled = piece[taken:], filled + taken
            if filled == size:
                yield memoryview(room)
                filled = 0
    if filled:
        yield memoryview(room)[:filled]
