"""Killed at random moments: nothing that was acknowledged is lost, nothing is unreadable, nothing appears."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time

from .workload import QUICK, STORES, Expected, fingerprint, work


def kill(count, seed, under="durable", rounds_per_store=15):
    """`count` processes killed; returns what was seen."""
    rng, expected, make = random.Random(seed), Expected(), STORES[under]
    acknowledged = landed = step = 0
    folder = None
    for n in range(count):
        if n % rounds_per_store == 0:
            if folder is not None:
                shutil.rmtree(folder)
            folder, step = tempfile.mkdtemp(dir=QUICK), 0
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                work(make(folder + "/store"), step, lambda step, to=writing: os.write(to, b"."))
            finally:
                os._exit(1)
        os.close(writing)
        time.sleep(rng.random() ** 2 * 0.15)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with open(reading, "rb") as pipe:
            told = len(pipe.read())
        assert os.WIFSIGNALED(status), f"round {n}: the process ended by itself"
        store = make(folder + "/store")
        try:
            found = fingerprint(store.found())
        finally:
            store.close()
        at = step + told
        assert found in (expected[at], expected[at + 1]), f"round {n}, seed {seed}: not the state after {at} commits"
        acknowledged += told
        landed += found != expected[at]
        step = at + (found != expected[at])
    shutil.rmtree(folder)
    return {"killed": count, "commits acknowledged": acknowledged, "commits that landed unacknowledged": landed}
