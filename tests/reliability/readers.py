"""A process that reads while another writes, compacts and deletes: all it sees was committed, and never goes back."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time

import perdure

from .workload import QUICK, Durable, Expected, fingerprint, work

AHEAD = 400  # commits that a writer may make while a reader looks once


def readers(count, seed):
    """`count` memories read; at moments that follow from `seed`, the writer is killed and another goes on."""
    expected, folder = Expected(), tempfile.mkdtemp(dir=QUICK)
    path, step, read, writers = folder + "/store", 0, 0, 0
    try:
        while read < count:
            store = Durable(path)
            found = fingerprint(store.found())
            store.close()
            step = next(s for s in range(step, step + 10_000) if expected[s] == found)
            writers += 1
            child = os.fork()
            if not child:
                try:
                    work(Durable(path), step, lambda step: time.sleep(0.002))
                finally:
                    os._exit(1)
            try:
                read += follow(path, expected, step, min(20 + (seed + 7 * writers) % 50, count - read))
            finally:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "the writer ended by itself"
    finally:
        shutil.rmtree(folder)
    return {"memories read": read, "commits": step, "writers": writers}


def follow(path, expected, start, count):
    """Read `count` memories, each of which must be as some commit left it, no earlier than it was seen before."""
    seen, read = {}, 0
    with perdure.open(path, readonly=True) as reader:
        while read < count:
            for name in reader.names():
                try:
                    found = fingerprint({name: reader.memory(name)})
                except (perdure.ArgumentError, perdure.StoreError):
                    continue  # deleted meanwhile
                first = seen.get(name, start)
                at = next((s for s in range(first, first + AHEAD) if expected.part(s, name) == found), None)
                assert at is not None, f"{name} is not as any commit from {first} on left it"
                seen[name], read = at, read + 1
            reader.refresh()
    return read
