"""Many readers or one writer; and what a fork leaves of the lock.

Lock order, from the outside in: a store's connection, a stored memory's write lock, a store's table, and last of all
the lock of a memory. No public method of a memory calls another one while it holds the lock, and nothing is called
back from inside it.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ..backends.errors import ForkError

P = ParamSpec("P")
T = TypeVar("T")
_forks = 0  # how many forks lie between the first process and this one
_renewal = threading.Lock()


def _forked() -> None:
    global _forks, _renewal
    _forks += 1
    _renewal = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def forks() -> int:
    """A number that changes in the child of every fork."""
    return _forks


class ReadWriteLock:
    """`with lock.reading:` by many threads at once, `with lock.writing:` by one and no reader; neither is re-entrant.

    Who comes first is served first, so readers that keep coming do not starve a writer. After a fork the child's copy
    is free again, unless a write was under way in another thread of the parent: what it wrote is then half there, and
    every use in the child raises ForkError. So it is with an index that another thread was bringing up to date.
    Copying or pickling gives a new lock. Cost: under a microsecond.
    """

    def __init__(self) -> None:
        self.reading, self.writing = _Reading(self), _Writing(self)
        self._free()

    def _free(self) -> None:
        self._queue = threading.Lock()  # held while waiting for one's turn: first come, first served
        self._count = threading.Lock()  # guards _readers
        self._turn = threading.Lock()  # held by the writer, or by the readers together
        self._readers = 0
        self._torn = False  # true while a write is under way
        self._forks = _forks

    def _after_fork(self) -> None:
        with _renewal:
            if self._forks == _forks:
                return
            if self._torn:
                raise ForkError(
                    "memory",
                    "no write, and no index being made, when the process forked",
                    "a memory that another thread was changing",
                    "Fork first and open the memory in the child, or start processes with the 'spawn' method.",
                )
            self._free()

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadWriteLock, ()


class _Reading:
    def __init__(self, lock: ReadWriteLock):
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        if lock._forks != _forks:
            lock._after_fork()
        with lock._queue, lock._count:
            if lock._readers == 0:
                lock._turn.acquire()
            lock._readers += 1

    def __exit__(self, *exception: object) -> None:
        lock = self._lock
        with lock._count:
            lock._readers -= 1
            if lock._readers == 0:
                lock._turn.release()


class _Writing:
    def __init__(self, lock: ReadWriteLock):
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        if lock._forks != _forks:
            lock._after_fork()
        with lock._queue:
            lock._turn.acquire()
        lock._torn = True

    def __exit__(self, *exception: object) -> None:
        self._lock._torn = False
        self._lock._turn.release()


def shared(method: Callable[P, T]) -> Callable[P, T]:
    """A method that many threads may be in at once; `self._lock` is the memory's lock."""

    @functools.wraps(method)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with args[0]._lock.reading:  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return locked


def exclusive(method: Callable[P, T]) -> Callable[P, T]:
    """A method that one thread is in at a time, and none in a shared one."""

    @functools.wraps(method)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with args[0]._lock.writing:  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return locked
