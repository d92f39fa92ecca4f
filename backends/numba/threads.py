"""A pool of plain threads for compiled loops that release the interpreter lock.

Made on first use, never by import, and forgotten in a forked child, which makes its own: nothing a fork could trap.
NUMBA_NUM_THREADS says how many threads there are at most, by default as many as the process has cores, and a limit
of threadpoolctl how many of them work.
"""

from __future__ import annotations

import contextvars
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numba import config

from .. import limits

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_here = threading.local()


def limit() -> int:
    """The most threads that work at once; 1 inside a thread of the pool."""
    return 1 if getattr(_here, "working", False) else limits.most(config.NUMBA_NUM_THREADS)


def in_parallel(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """[work(*task) for task in tasks], several at once, each with the caller's choice of backend."""
    workers = min(limit(), len(tasks))
    if workers < 2:
        return [work(*task) for task in tasks]
    turns, results = itertools.count(), [None] * len(tasks)

    def some() -> None:
        while (turn := next(turns)) < len(tasks):
            results[turn] = work(*tasks[turn])

    for done in [_threads().submit(contextvars.copy_context().run, some) for _ in range(workers)]:
        done.result()
    return results


def rows_in_parallel(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The same for the rows of a memory: few of them leave the threads to what each row does by itself."""
    return in_parallel(work, tasks) if len(tasks) >= limit() else [work(*task) for task in tasks]


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(config.NUMBA_NUM_THREADS, "perdure", initializer=_mark)
        return _pool


def _mark() -> None:
    _here.working = True


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
