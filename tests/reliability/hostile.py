"""Objects that should not be opened: refused soon, without harm outside, without much memory."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import socket
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

import perdure

from .mutate import memory, resealed, watched
from .workload import STORES

SECONDS = 2


def sealed(header, data=b""):
    """A file with this header, text or JSON, and a seal that matches."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return resealed(len(text).to_bytes(8, "little") + text) + data


def about(**changes):
    made = {"format": "perdure memory", "seal": "0" * 64, "sha256": {}, "version": 1} | changes
    return {"perdure": json.dumps(made, separators=(",", ":"))}


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def contents():
    """Hostile contents of a file, by name."""
    deep = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    meta = json.dumps({"__metadata__": about()}).encode()[:-1]
    many = {f"t{i}": tensor(shape=(0,), offsets=(0, 0)) for i in range(20_000)}
    cases = {
        "empty": b"",
        "seven bytes": b"\0" * 7,
        "zeros": bytes(4096),
        "random": np.random.default_rng(0).bytes(4096),
        "pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "zip": b"PK\x03\x04" + bytes(100),
        "npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "text": b"hello",
        "header of 2^64 bytes": b"\xff" * 8 + b"{}",
        "header of 2^63 bytes": b"\0" * 7 + b"\x80" + b"{}",
        "header larger than the file": (10**6).to_bytes(8, "little") + b"{}",
        "no JSON": sealed(b"nothing"),
        "a list": sealed([1, 2]),
        "a number": sealed(b"1"),
        "null": sealed(b"null"),
        "deep": sealed(deep),
        "deep after a seal": sealed(meta + b',"x":' + deep + b"}"),
        "no metadata": sealed({"a": tensor()}, bytes(4)),
        "metadata that is a list": sealed({"__metadata__": [], "a": tensor()}, bytes(4)),
        "two seals": sealed(json.dumps({"__metadata__": about() | {"b": about()["perdure"]}}).encode()),
        "no version": sealed({"__metadata__": {"perdure": '{"seal":"' + "0" * 64 + '"}'}}),
        "version 2": sealed({"__metadata__": about(version=2)}),
        "version of 300 digits": sealed({"__metadata__": about(version=int("9" * 300))}),
        "no tensors": sealed({"__metadata__": about()}),
        "20,000 tensors": sealed({"__metadata__": about(sha256=dict.fromkeys(many, "")), **many}),
        "a tensor twice": sealed(meta + b',"a":' + json.dumps(tensor()).encode() * 1 + b',"a":[]}', bytes(4)),
        "unfinished UTF-8": sealed(meta + b',"\xff\xfe":1}'),
        "NUL in a name": sealed({"__metadata__": about(sha256={"\0": ""}), "\0": tensor()}, bytes(4)),
        "a path as a name": sealed({"__metadata__": about(sha256={"../x": ""}), "../../x": tensor()}, bytes(4)),
    }
    shapes = {
        "overlapping": {"a": tensor(), "b": tensor()},
        "a gap": {"a": tensor(), "b": tensor(offsets=(8, 12))},
        "backwards": {"a": tensor(offsets=(4, 0))},
        "negative": {"a": tensor(offsets=(-4, 0))},
        "beyond the end": {"a": tensor(shape=(2**40,), offsets=(0, 2**42))},
        "2^64 elements": {"a": tensor(shape=(2**32, 2**32), offsets=(0, 4))},
        "a negative axis": {"a": tensor(shape=(-1, -1), offsets=(0, 4))},
        "a fractional axis": {"a": tensor(shape=(1.5,), offsets=(0, 4))},
        "1,000 axes": {"a": tensor(shape=(1,) * 1000)},
        "an unknown dtype": {"a": tensor(dtype="O")},
        "a dtype that is code": {"a": tensor(dtype="__import__('os')")},
        "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
        "a checksum that is a list": {"a": tensor()},
    }
    for name, tensors in shapes.items():
        checks = [] if name == "a checksum that is a list" else dict.fromkeys(tensors, "0" * 64)
        cases[name] = sealed({"__metadata__": about(sha256=checks), **tensors}, bytes(16))
    return cases


def objects(folder, outside):
    """Hostile things that are no files, by name: each makes itself at a path."""
    return {
        "pipe": os.mkfifo,
        "link to a file": lambda path: os.symlink(outside, path),
        "link to a device": lambda path: os.symlink("/dev/zero", path),
        "link to nothing": lambda path: os.symlink(folder / "nothing", path),
        "link to itself": lambda path: os.symlink(path, path),
        "folder": os.mkdir,
        "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
        "1 TiB of nothing": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
        "unreadable": lambda path: (path.touch(), path.chmod(0)),
    }


def refused(name, action):
    """`action` must raise the library's own error, soon, with little memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        watched(action)
    except perdure.PerdureError:
        pass
    else:
        raise AssertionError(f"{name}: accepted")
    assert time.monotonic() - started < SECONDS, f"{name}: took {time.monotonic() - started:.1f} s"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used < 512 << 10, f"{name}: took {used >> 10} MiB"


def hostile(count, seed, under="durable"):
    """Every case, for the file of a memory and for every file of a store; `count` and `seed` do not matter."""
    done = 0
    STORES[under].breaks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outside = folder / "outside"
        outside.write_bytes(b"precious")
        saved = folder / "saved"
        memory().save(saved)
        perdure.open(folder / "store").close()
        with sqlite3.connect(folder / "other") as other:
            other.execute("CREATE TABLE t (a)")
        other.close()
        more = {"a database": (folder / "other").read_bytes(), "a memory": saved.read_bytes()}
        plain = folder / "plain"
        safetensors.numpy.save_file({"a": np.zeros(3)}, plain)
        for case, content in {**contents(), **more, "another's": plain.read_bytes()}.items():
            path = folder / "case"
            for mmap in (False, True):
                if case != "a memory":
                    path.write_bytes(content)
                    refused(case, lambda path=path, mmap=mmap: perdure.load(path, mmap=mmap))
                    done += 1
            if content:
                as_database = functools.partial(opened, folder, "store.sqlite", functools.partial(put, content))
                refused(f"{case} as a store", as_database)
                done += 1
        for case, make in objects(folder, outside).items():
            if case == "unreadable" and os.geteuid() == 0:
                continue
            path = folder / "case"
            remove(path)
            make(path)
            refused(case, lambda path=path: perdure.load(path))
            if case not in ("1 TiB of nothing", "unreadable"):
                refused(f"save over {case}", lambda path=path: memory().save(path))
            remove(path)
            done += 2
            for file in ("store.sqlite", "store.sqlite-wal", "store.sqlite-shm", "lock", "bodies"):
                if case in ("1 TiB of nothing", "unreadable") and file != "store.sqlite":
                    continue
                refused(f"{case} as {file}", lambda file=file, make=make: opened(folder, file, make))
                done += 1
        assert outside.read_bytes() == b"precious"
    return {"cases": done}


def put(content, path):
    path.write_bytes(content)


def opened(folder, file, make):
    """Open a store in which one file has been replaced."""
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "store", place)
    remove(place / file)
    make(place / file)
    perdure.open(place).close()


def remove(path):
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
