"""One memory in one file: the safetensors format, sealed by checksums, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap as mapping
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from ..backends.arrays import optional_import
from ..backends.errors import ArgumentError, FileError
from .disk import as_path, opened, replacing, write_at
from .kinds import kind_of, revive
from .protocol import Memory
from .state import Mapped, Owned, unpack

VERSION = 1
DTYPES = {
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype("?"),
}
LARGEST_HEADER = 64 << 20  # bytes; a memory of 100,000 rows has a header of 40 MB
PIECE = 1 << 20  # bytes read and hashed at a time, so that they are hashed while in cache
_SEAL = re.compile(rb'\\"seal\\":\\"([0-9a-f]{64})\\"')
_VERSION = re.compile(rb'\\"version\\":(\d{1,9})[,}]')
_DAMAGED = "Restore it from a copy."
# Without it, Linux refuses a private mapping that exceeds main memory; Python names it from 3.13 on.
_NO_RESERVE = getattr(mapping, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def save(memory: Memory, path: str | os.PathLike[str]) -> None:
    """Save a memory to one file, durably: the old file or the new one is there whole, whatever happens.

    Parameters
    ----------
    memory : Memory
    path : path
        Replaced, where a file is there already.

    Raises
    ------
    FileError
        It cannot be written; what was there before is still there.
    MissingPackageError
        Without the safetensors package.

    Notes
    -----
    The file is in safetensors format, and the safetensors library opens it. Its metadata hold, under "perdure", the
    format's version, the SHA-256 of every array, and that of the header itself. Cost: one SHA-256 over the state, one
    write, and the flush of file and folder; a KNNMemory takes no writes meanwhile, of other memories a copy is made.
    Only its owner may read the file (mode 600).
    """
    kind_of(memory)
    held = memory._unchanged() if isinstance(memory, Savable) else contextlib.nullcontext(memory.state_dict())
    with held as state:
        save_arrays(state, path)


def save_arrays(arrays: dict[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Save a flat dict of arrays as `save` does a memory's.

    Raises
    ------
    FileError, MissingPackageError
    """
    path = as_path(path)
    library = optional_import("safetensors", extra="store")
    numpy_part = optional_import("safetensors.numpy", extra="store")
    state = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    about = {
        "format": "perdure memory",
        "seal": "0" * 64,
        "sha256": {name: hashlib.sha256(_bytes(state[name])).hexdigest() for name in sorted(state)},
        "version": VERSION,
    }
    with replacing(path) as new:
        try:
            numpy_part.save_file(state, new, metadata={"perdure": json.dumps(about, separators=(",", ":"))})
        except library.SafetensorError as error:
            raise OSError(str(error)) from error
        _seal(new)


def load(
    path: str | os.PathLike[str], *, mmap: bool = False, verify: bool | None = None, largest: int | None = None
) -> Memory:
    """The memory that `save` put into a file.

    Parameters
    ----------
    path : path
        A regular file; symbolic links, pipes and devices are refused.
    mmap : bool
        Leave the arrays on disk and read what is touched: a memory may exceed the machine's, and processes share one
        copy. The file is never written to: what the memory changes, it keeps to itself.
    verify : bool, optional
        Check every array against its checksum. By default so, unless `mmap`, where that would read the whole file; the
        header is checked always.
    largest : int, optional
        Refuse files of more bytes. By default the machine's memory, or none with `mmap`.

    Returns
    -------
    Memory
        Of the kind that was saved; its behaviour is bit-identical from there on.

    Raises
    ------
    FileError
        Not such a file, damaged, too large, or of a newer version.
    MissingPackageError
        Without the safetensors package.

    Notes
    -----
    Nothing is executed from the file, and nothing is allocated before sizes and checksum of the header are checked.
    """
    state = load_arrays(path, mmap=mmap, verify=verify, largest=largest)
    try:
        return revive(state)
    except ArgumentError as error:
        raise FileError(str(path), "a saved memory", f"{error.received} in {error.argument}", _DAMAGED) from error


def load_arrays(
    path: str | os.PathLike[str], *, mmap: bool = False, verify: bool | None = None, largest: int | None = None
) -> dict[str, np.ndarray]:
    """The flat dict of arrays that `save_arrays` put into a file; the arguments are those of `load`.

    Raises
    ------
    FileError, MissingPackageError
    """
    path = as_path(path)
    library = optional_import("safetensors", extra="store")
    with opened(path) as (descriptor, size):
        largest = _memory_of_machine() if largest is None and not mmap else largest
        if largest is not None and size > largest:
            raise FileError(str(path), f"at most {largest} bytes", f"{size}", "Pass largest=, or mmap=True.")
        header = _header(path, descriptor, size)
        layout, digests = _layout(library, path, descriptor, header, size)
        read = _map if mmap else _read
        try:
            return dict(read(path, descriptor, size, layout, digests, not mmap if verify is None else verify))
        except (OSError, ValueError, MemoryError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(str(path), "a file that can be read", str(error), "Check memory and disk.") from error


class Savable:
    """Gives a memory its `save`, and its `from_state_dict` from what is special to its kind."""

    _kind: ClassVar[str]

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[dict[str, np.ndarray]]:
        """The state for as long as the block runs, whatever is written meanwhile."""
        yield self.state_dict()  # type: ignore[attr-defined]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to one file at `path`, durably and checksummed; `perdure.load` gives the memory back.

        Raises
        ------
        FileError
            It cannot be written; what was there before is still there.
        MissingPackageError
            Without the safetensors package.
        """
        save(self, path)  # type: ignore[arg-type]

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The memory whose `state_dict` gave `state`; its behaviour is bit-identical from here on.

        Raises
        ------
        ArgumentError
            No state of a memory of this kind, or an altered one.
        """
        return cls._restored(*unpack(cls._kind, state))

    @classmethod
    def _restored(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        raise NotImplementedError


def _seal(path: Path) -> None:
    """Write into the header the digest of the header, taken while zeros stood in its place."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        (found,) = _SEAL.finditer(header)
        write_at(file.fileno(), memoryview(_digest(header).encode()), 8 + found.start(1))


def _header(path: Path, descriptor: int, size: int) -> bytes:
    """The header, read and checked against its seal before anything parses it."""
    length = int.from_bytes(_exactly(descriptor, 0, min(size, 8)), "little")
    if size < 8 or length > size - 8 or length > LARGEST_HEADER:
        raise FileError(str(path), "a saved memory", "a file that is none, or cut off", _DAMAGED)
    header = _exactly(descriptor, 8, length)
    seals, versions = _SEAL.findall(header), _VERSION.findall(header)
    if len(seals) != 1 or len(versions) != 1:
        raise FileError(str(path), "a file made by perdure's save", "one without its seal", "Load it as what it is.")
    if int(versions[0]) > VERSION:
        newer = f"version {int(versions[0])}, written by a newer perdure"
        raise FileError(str(path), f"format version {VERSION} or older", newer, "Upgrade perdure to read it.")
    zeroed = _SEAL.sub(lambda found: found[0].replace(found[1], b"0" * 64), header)
    if _digest(zeroed) != seals[0].decode():
        raise FileError(str(path), "a header that matches its checksum", "one that does not", _DAMAGED)
    return header


def _layout(
    library: Any, path: Path, descriptor: int, header: bytes, size: int
) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...], int]], dict[str, str]]:
    """Dtype, shape and offset in the file of every array, and every array's digest.

    The library judges the layout, through the descriptor that is open already where the system can name it: no gaps,
    no overlaps, sizes that match. Where each array lies it does not tell, so that is read from the header once more.
    """
    named = f"/dev/fd/{descriptor}"
    try:
        with library.safe_open(named if os.path.exists(named) else path, framework="numpy") as judged:
            about = json.loads(judged.metadata()["perdure"], object_pairs_hook=_distinct)
        entries = json.loads(header, object_pairs_hook=_distinct)
        del entries["__metadata__"]
        layout = {}
        for name, entry in entries.items():
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if math.prod(shape) * dtype.itemsize != end - begin or not 0 <= begin <= end <= size - 8 - len(header):
                raise ValueError(f"{name} has impossible offsets")
            layout[name] = dtype, shape, 8 + len(header) + begin
        digests = about["sha256"]
        if about["format"] != "perdure memory" or digests.keys() != layout.keys():
            raise ValueError("checksums are missing")
    except (library.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(str(path), "a saved memory", f"a header that is none ({error})"[:300], _DAMAGED) from error
    return layout, digests


def _read(path: Path, descriptor: int, size: int, layout: Any, digests: Any, verify: bool) -> Iterator[Any]:
    for name, (dtype, shape, offset) in layout.items():
        array = np.empty(shape, dtype)
        room, digest = _bytes(array), hashlib.sha256()
        for start in range(0, len(room), PIECE):
            piece = room[start : start + PIECE]
            if os.preadv(descriptor, [piece], offset + start) != len(piece):
                raise FileError(str(path), "a whole file", "one that was cut while it was read", _DAMAGED)
            if verify:
                digest.update(piece)
        if verify:
            _compare(path, name, digest.hexdigest(), digests[name])
        yield name, array.astype(dtype.newbyteorder("="), copy=False).view(Owned)


def _map(path: Path, descriptor: int, size: int, layout: Any, digests: Any, verify: bool) -> Iterator[Any]:
    private, both = mapping.MAP_PRIVATE | _NO_RESERVE, mapping.PROT_READ | mapping.PROT_WRITE
    mapped = mapping.mmap(descriptor, size, flags=private, prot=both)
    for name, (dtype, shape, offset) in layout.items():
        array = np.empty(shape, dtype)[...] if 0 in shape else np.ndarray(shape, dtype, mapped, offset)
        if verify:
            _compare(path, name, hashlib.sha256(_bytes(array)).hexdigest(), digests[name])
        yield name, array.view(Owned if verify else Mapped)


def _compare(path: Path, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise FileError(str(path), f"{name} to match its checksum", "other bytes", _DAMAGED)


def _exactly(descriptor: int, offset: int, length: int) -> bytes:
    """That many bytes of the file, or fewer at its end."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    parts = []
    while length and (part := os.read(descriptor, length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _digest(header: bytes) -> str:
    return hashlib.sha256(len(header).to_bytes(8, "little") + header).hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, uncopied."""
    return array.reshape(-1).view(np.uint8).data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made


def _memory_of_machine() -> int | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
