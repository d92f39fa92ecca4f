"""Damaged files: refused by the library's own error, or what was saved; never a crash, a hang, or something else."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
from perdure.memory import file

import perdure

from .workload import CONFIG, QUICK, STORES, Expected, fingerprint, work

SECONDS = 20  # of one case
MOST_MEMORY = 512 << 20


def mutated(whole, rng):
    """`whole` with one to four kinds of damage, and the name of the last."""
    damaged, kind = bytearray(whole), ""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.choice(("bits", "bytes", "cut", "swap", "zeros", "repeat", "numbers"))
        size = len(damaged)
        if size < 16:
            break
        a, b, n = rng.randrange(size), rng.randrange(size), rng.choice((1, 16, 512, 4096))
        match kind:
            case "bits":
                damaged[a] ^= 1 << rng.randrange(8)
            case "bytes":
                damaged[a : a + n] = rng.randbytes(len(damaged[a : a + n]))
            case "cut":
                del damaged[a:]
            case "swap":
                a, b = a // n * n, b // n * n
                damaged[a : a + n], damaged[b : b + n] = damaged[b : b + n], damaged[a : a + n]
            case "zeros":
                damaged[a : a + n] = bytes(len(damaged[a : a + n]))
            case "repeat":
                damaged[a:a] = damaged[b : b + n]
            case "numbers":
                digits = [m.start() for m in re.finditer(rb"\d", damaged[:4096])] or [a]
                damaged[rng.choice(digits)] = rng.choice(b"0123456789-")
    return bytes(damaged), kind


def watched(case, *args, **options):
    """Run a case within its time; what it used of memory is seen at the end."""
    signal.alarm(SECONDS)
    try:
        return case(*args, **options)
    finally:
        signal.alarm(0)


def grown(before):
    """Fail where the process has grown by more than a case may take."""
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert used < MOST_MEMORY, f"{used} bytes of memory"
    return used >> 20


def memory():
    made = perdure.KNNMemory(**CONFIG)
    keys = np.random.default_rng(0).standard_normal((2, 2, 40, 8)).astype(np.float32)
    made.write(keys, keys, tags=7)
    return made


def mutate_files(count, seed, under="durable"):
    """Files of one memory; a third of them with a seal that matches, as one who knows the format can make it."""
    rng, before = random.Random(seed), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = unchanged = 0
    STORES[under].breaks()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "memory")
        memory().save(path)
        whole, expected = path.read_bytes(), fingerprint({"": memory()})
        for n in range(count):
            damaged, kind = mutated(whole, rng)
            sealed = rng.random() < 0.33
            if sealed:
                damaged = resealed(damaged)
            path.write_bytes(damaged)
            try:
                found = watched(perdure.load, path, mmap=n % 2 == 0, verify=True)
            except perdure.FileError:
                refused += 1
                continue
            same = fingerprint({"": found}) == expected
            assert same or (sealed and damaged[8:2000] != whole[8:2000]), f"{kind}, case {n}, seed {seed}: not noticed"
            unchanged += same
    return {"files": count, "refused": refused, "unchanged": unchanged, "MiB": grown(before)}


def resealed(damaged):
    """The header's own checksum put right, where there is still a header."""
    length = int.from_bytes(damaged[:8], "little")
    header = damaged[8 : 8 + length]
    if length > len(damaged) or len(file._SEAL.findall(header)) != 1:
        return damaged
    zeroed = file._SEAL.sub(lambda found: found[0].replace(found[1], b"0" * 64), header)
    digest = file._digest(zeroed).encode()
    sealed = file._SEAL.sub(lambda found: found[0].replace(found[1], digest), header)
    return damaged[:8] + sealed + damaged[8 + length :]


def mutate_stores(count, seed, under="durable"):
    """Stores with damage in the database or the bodies, once closed well and once after a kill, with a log."""
    rng, expected, make = random.Random(seed), Expected(), STORES[under]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = unchanged = 0
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        closed, killed, place = (os.path.join(folder, name) for name in ("closed", "killed", "place"))
        store = make(closed)
        work(store, 0, lambda step: None, 13)
        shutil.copytree(closed, killed)  # with its log, as a kill would leave it
        store.close()
        wanted = expected[13]
        for n in range(count):
            source = rng.choice((closed, killed))
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(source, place)
            names = sorted(p.name for p in Path(place).iterdir() if p.stat().st_size and not p.name.endswith("-shm"))
            name = rng.choice(names)
            target = Path(place, name)
            damaged, kind = mutated(target.read_bytes(), rng)
            target.write_bytes(damaged)
            Path(place, "store.sqlite-shm").unlink(missing_ok=True)
            try:
                found = watched(read_all, make, place)
            except perdure.FileError:
                refused += 1
                continue
            unchanged += 1
            assert found == wanted, f"{kind} in {name}, case {n}, seed {seed}: not noticed"
    return {"stores": count, "refused": refused, "unchanged": unchanged, "MiB": grown(before)}


def read_all(make, path):
    store = make(path)
    try:
        return fingerprint({name: store.store.memory(name) for name in store.store.names()})
    finally:
        store.close()
