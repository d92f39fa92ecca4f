"""A process that reads while another writes, compacts and deletes: all it sees was committed, nothing is seen late."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import tempfile
import time

import perdure

from .workload import QUICK, STORES, Expected, fingerprint, work

AHEAD = 400  # commits that a writer may make while a reader looks once


def readers(count, seed, under="durable"):
    """`count` memories read; at moments that follow from `seed`, the writer is killed and another goes on."""
    expected, folder, make = Expected(), tempfile.mkdtemp(dir=QUICK), STORES[under]
    path, step, read, writers = folder + "/store", 0, 0, 0
    told = mmap.mmap(-1, 8)  # shared with the writers: the last step whose commit has returned
    try:
        while read < count:
            store = make(path)
            found = fingerprint(store.found())
            store.close()
            step = next(s for s in range(step, step + 10_000) if expected[s] == found)
            tell(told, step)
            writers += 1
            child = os.fork()
            if not child:
                try:
                    work(make(path), step, lambda step: (tell(told, step), time.sleep(0.002)))
                finally:
                    os._exit(1)
            try:
                read += follow(path, expected, told, min(20 + (seed + 7 * writers) % 50, count - read))
            finally:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "the writer ended by itself"
    finally:
        shutil.rmtree(folder)
    return {"memories read": read, "commits": step, "writers": writers}


def tell(told, step):
    told[:8] = step.to_bytes(8, "little")


def follow(path, expected, told, count):
    """Read `count` memories, each as some commit left it: none older than the last one told when it was asked for."""
    read = 0
    with perdure.open(path, readonly=True) as reader:
        while read < count:
            first = int.from_bytes(told[:8], "little")
            names = reader.names()
            possible = any(expected.names(s) == names for s in range(first, first + AHEAD))
            assert possible, f"{names} are not the names after any commit from {first} on"
            for name in names:
                first = int.from_bytes(told[:8], "little")
                try:
                    found = fingerprint({name: reader.memory(name)})
                except (perdure.ArgumentError, perdure.StoreError):
                    continue  # deleted meanwhile
                at = next((s for s in range(first, first + AHEAD) if expected.part(s, name) == found), None)
                assert at is not None, f"{name} is not as any commit from {first} on left it"
                read += 1
            reader.refresh()
    return read
