"""Memories when a batch is spread over processes: each rank holds the memory of its own rows, as it holds the rows.

Nothing is broadcast while a model trains: a memory is no parameter and no buffer. What is here is for the moments when
rows change hands: one checkpoint of all ranks, another number of ranks, another order of the rows.
"""

from __future__ import annotations

from typing import Any

from ..backends.errors import ArgumentError
from ..backends.registry import load

load("torch")  # or MissingPackageError

import torch.distributed as dist  # noqa: E402

from .torch import State  # noqa: E402

__all__ = ["gather", "split"]


def gather(memory: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The rows of all ranks, those of rank 0 first, as one memory that every rank has for itself.

    Parameters
    ----------
    memory : State, or tuple of State as a MemoryTransformer's
        This rank's; any number of rows.
    group : ProcessGroup, optional
        The ranks; all by default. Every one of them calls.

    Returns
    -------
    State, or tuple of State

    Raises
    ------
    ArgumentError
        Memories of several kinds or configurations.

    Notes
    -----
    Every rank receives the memory of all: for a kNN memory that is its bytes times the ranks. `memory.join` does the
    same with memories that are in one process already.

    Examples
    --------
    Write one checkpoint of all rows, and go on from it on another number of ranks::

        whole = gather(memory)
        if dist.get_rank() == 0:
            torch.save(model.memory_state_dict(whole), "memory.pt")
        ...
        memory = split(model.memory_from_state_dict(torch.load("memory.pt")))
    """
    if isinstance(memory, tuple):
        return tuple(gather(state, group) for state in memory)
    if not isinstance(memory, State):
        raise ArgumentError("memory", "a State, or a tuple of them", type(memory).__name__, "Pass what a layer gave.")
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, memory.state_dict(), group=group)
    return type(memory).join([type(memory).from_state_dict(state) for state in states])


def split(memory: Any, group: dist.ProcessGroup | None = None) -> Any:
    """This rank's share of the rows of a memory that every rank has whole: successive rows, the same number a rank.

    Parameters
    ----------
    memory : State, or tuple of State
    group : ProcessGroup, optional

    Returns
    -------
    State, or tuple of State

    Raises
    ------
    ArgumentError
        Rows that cannot be shared out evenly.
    """
    if isinstance(memory, tuple):
        return tuple(split(state, group) for state in memory)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if memory.rows % ranks:
        raise ArgumentError("memory", f"a multiple of {ranks} rows", str(memory.rows), "Use memory.select(rows).")
    share = memory.rows // ranks
    return memory.select(range(rank * share, (rank + 1) * share))
