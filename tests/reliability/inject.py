"""Every write, flush, rename, truncation and removal failing, cut short, or the last thing done before a kill."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import perdure

from .workload import NAMES, QUICK, STORES, Expected, do, fingerprint

MODES = {"fail once": 1, "fail from then on": 2, "kill before": 3, "kill after": 4, "cut short": 5}
STEPS = 11
SAVED = (4, 9)  # steps after which one memory is also saved to a file


def preloaded(arguments):
    """Run `python -m reliability ...` with the shim preloaded; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder, "faults.so")
        source = Path(__file__).with_name("faults.c")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
        environment = os.environ | {"LD_PRELOAD": str(shim)}
        return subprocess.run(
            [sys.executable, "-m", "reliability", *arguments],
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )


def steps(store, file, told):
    """The workload, in which a commit that fails is tried again after the next step."""
    for step in range(STEPS):
        do(step, store.memory, store.delete)
        told(b"a")
        try:
            store.checkpoint() if step % 5 == 4 else store.commit()
            told(b"c")
        except perdure.PerdureError:
            pass
        if step in SAVED:
            told(b"s")
            with contextlib.suppress(perdure.PerdureError):
                store.memory(NAMES[1]).save(file)
                told(b"S")


def attempt(make, folder, mode, nth, number):
    """One child under one fault; how it ended, and what it told."""
    shim = ctypes.CDLL(None)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        shim.faults_watch(folder.encode(), -1)
        shim.faults_set(mode, ctypes.c_long(nth), number)
        code = 0
        try:
            store = make(folder + "/store")
            steps(store, folder + "/saved", lambda text: os.write(writing, text))
            shim.faults_set(0, ctypes.c_long(0), 0)
            store.close()
        except perdure.PerdureError:
            code = 2
        except BaseException as error:
            os.write(2, f"{MODES} {mode} {nth}: {error!r}\n".encode())
            code = 3
        os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with open(reading, "rb") as pipe:
        return status, pipe.read()


def calls(make):
    """How many calls the workload makes that can fail."""
    shim = ctypes.CDLL(None)
    shim.faults_count.restype = ctypes.c_long
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            shim.faults_watch(folder.encode(), -1)
            shim.faults_set(0, ctypes.c_long(0), 0)
            store = make(folder + "/store")
            steps(store, folder + "/saved", lambda text: None)
            os.write(writing, str(shim.faults_count()).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        with open(reading, "rb") as pipe:
            return int(pipe.read())


def inject(count, seed, under="durable", modes=tuple(MODES)):
    """Every `stride`-th point, so that about `count` faults are tried; 0 tries all."""
    make, expected = STORES[under], Expected()
    total = calls(make)
    stride = 1 if not count else max(1, round(total * len(modes) / count))
    done = dict.fromkeys(modes, 0)
    for m, mode in enumerate(modes):
        for nth in range(1 + (seed + m) % stride, total + 1, stride):
            with tempfile.TemporaryDirectory(dir=QUICK) as folder:
                number = errno.ENOSPC if nth % 2 else errno.EIO
                status, told = attempt(make, folder, MODES[mode], nth, number)
                where = f"{mode} at call {nth} of {total}"
                if os.WIFSIGNALED(status):
                    assert os.WTERMSIG(status) == signal.SIGKILL, where
                    assert "kill" in mode, where
                else:
                    assert os.WEXITSTATUS(status) in (0, 2), f"{where}: an error of somebody else"
                attempted = told.count(b"a")
                last = told.rfind(b"c")
                acknowledged = told[:last].count(b"a") if last >= 0 else 0
                store = make(folder + "/store")
                try:
                    found = fingerprint(store.found())
                finally:
                    store.close()
                possible = {expected[step] for step in range(acknowledged, attempted + 1)}
                assert found in possible, f"{where}: not a state between commits {acknowledged} and {attempted}"
                check_file(Path(folder, "saved"), told.replace(b"a", b"").replace(b"c", b""), expected, where)
            done[mode] += 1
    return {"calls that can fail": total, **done}


def check_file(path, told, expected, where):
    """The file is the last whose saving was acknowledged, or a later one that was begun; whole in any case."""
    acknowledged, attempted = told[: told.rfind(b"S") + 1].count(b"s"), told.count(b"s")
    possible = [expected.part(SAVED[i - 1] + 1, NAMES[1]) for i in range(max(acknowledged, 1), attempted + 1)]
    if path.exists() or acknowledged:
        assert fingerprint({NAMES[1]: perdure.load(path)}) in possible, f"{where}: the file is of no state saved"


def trace(count, seed, under="durable"):
    """No commit returns before all is flushed: files after their last write, folders after a change."""
    shim, make = ctypes.CDLL(None), STORES[under]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as told:
        shim.faults_watch(folder.encode(), told.fileno())
        store = make(folder + "/store")
        for step in range(count):
            do(step, store.memory, store.delete)
            store.commit()
            shim.faults_mark(b"acknowledged")
        shim.faults_watch(b"", -1)
        store.close()
        told.seek(0)
        lines = [line.split(" ", 1) for line in told.read().decode().splitlines()]
    waiting, acknowledged = set(), 0
    for call, path in lines:
        if call in ("fsync", "fdatasync"):
            waiting.discard(path)
        elif call == "mark":
            acknowledged += 1
            assert waiting == set(), f"acknowledged {acknowledged}, but not flushed: {waiting}"
        elif call in ("rename", "renameat", "unlink", "mkdir"):
            waiting.add(str(Path(path).parent))
        elif not path.endswith(("-shm", "/lock")):  # rebuilt after a crash; and a note that may be late
            waiting.add(path)
    flushed = {path for call, path in lines if call in ("fsync", "fdatasync")}
    assert folder + "/store" in flushed, "the folder itself was never flushed"
    assert acknowledged == count
    return {"commits traced": acknowledged, "calls": len(lines)}
