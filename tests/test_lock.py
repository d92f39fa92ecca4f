"""Many readers or one writer, first come first served; and forks."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time

import pytest
from perdure.memory.lock import ReadWriteLock

import perdure


def started(action):
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_readers_share_and_a_writer_does_not():
    lock, inside, most, torn = ReadWriteLock(), [0], [0], []

    def read():
        for _ in range(200):
            with lock.reading:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    def write():
        for _ in range(100):
            with lock.writing:
                before = inside[0]
                time.sleep(0)
                torn.append((before, inside[0]))

    barrier = [started(read) for _ in range(6)] + [started(write) for _ in range(2)]
    for thread in barrier:
        thread.join()
    assert most[0] >= 1
    assert set(torn) == {(0, 0)}


def test_two_readers_are_inside_at_once():
    lock, both = ReadWriteLock(), threading.Barrier(2, timeout=20)

    def read():
        with lock.reading:
            both.wait()

    for thread in [started(read), started(read)]:
        thread.join()
    assert not both.broken


def test_readers_that_keep_coming_do_not_starve_a_writer():
    lock, stop, wrote = ReadWriteLock(), threading.Event(), threading.Event()

    def read():
        while not stop.is_set():
            with lock.reading:
                time.sleep(0.001)

    def write():
        with lock.writing:
            wrote.set()

    readers = [started(read) for _ in range(4)]
    writer = started(write)
    assert wrote.wait(20)
    stop.set()
    for thread in (*readers, writer):
        thread.join()


@pytest.mark.parametrize("side", ["reading", "writing"])
def test_an_exception_frees_the_lock(side):
    lock = ReadWriteLock()
    with pytest.raises(KeyError), getattr(lock, side):
        raise KeyError
    with lock.writing:
        pass
    with lock.reading:
        pass


@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_a_copy_is_a_lock_of_its_own(travel):
    lock = ReadWriteLock()
    with lock.writing, travel(lock).writing:
        pass


def child(action):
    """What `action` gives in a forked child, within a few seconds."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            result = action()
        except BaseException as error:
            result = type(error).__name__
        os.write(writing, str(result).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        result = pipe.read().decode()
    os.waitpid(process, 0)
    return result


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("side", ["reading", "writing"])
def test_a_fork_while_another_thread_is_inside(side):
    lock, inside, leave = ReadWriteLock(), threading.Event(), threading.Event()

    def stay():
        with getattr(lock, side):
            inside.set()
            leave.wait()

    thread = started(stay)
    inside.wait()

    def use():
        with lock.writing:
            return "free"

    expected = "free" if side == "reading" else "ForkError"
    assert child(use) == expected
    leave.set()
    thread.join()
    assert child(use) == "free"


@needs_fork
def test_a_memory_is_a_copy_of_its_own_in_a_child():
    import numpy as np

    memory = perdure.KNNMemory(rows=1, heads=1, dim=2, capacity=4)
    ones = np.ones((1, 1, 3, 2))
    memory.write(ones, ones)

    def use():
        memory.write(ones[:, :, :1], ones[:, :, :1])
        return memory.tokens.tolist()

    assert child(use) == "[4]"
    assert memory.tokens.tolist() == [3]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("index", ["exact", "ivf"])
def test_a_fork_while_another_thread_brings_an_index_up_to_date(index):
    """The child is told; it does not wait for a thread that it does not have."""
    import numpy as np

    memory = perdure.KNNMemory(rows=1, heads=1, dim=2, capacity=4, index=index)
    ones = np.ones((1, 1, 3, 2))
    memory.write(ones, ones)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with memory._rows[0].index.lock:
            inside.set()
            leave.wait()

    thread = started(stay)
    inside.wait()
    assert child(lambda: memory.search(ones, 1)) == "ForkError"
    leave.set()
    thread.join()
    assert memory.search(ones, 1).positions.max() == 2
