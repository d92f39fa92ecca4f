"""KNNMemory behind an operator that PyTorch can trace, compile, checkpoint and differentiate around.

A token (two numbers) names a state of a memory: which memory, and how many steps it has taken. `recall` is a function
of its arguments: given a token and the window that goes with it, it brings the memory to that state and searches it.
Asked again it answers again without writing again, which is how a recomputed forward pass (gradient checkpointing)
leaves memory alone. A token whose past has been overwritten is refused.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Self

import numpy as np
import torch

from ...backends.errors import ArgumentError
from ...memory.knn import KNNMemory

_ledgers: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()
_numbers = itertools.count()
FOLLOWED_TO = {"cuda"}  # types of devices where a memory lives beside its layer; tests add the CPU


class Ledger:
    """A KNNMemory, how many steps it has taken, and what the last step was.

    Parameters
    ----------
    memory : KNNMemory
    segment, lag : int
        Tokens are written a segment at a time, when the segment is complete and `lag` tokens past.
    steps : int
    """

    def __init__(self, memory: KNNMemory, segment: int, lag: int, steps: int = 0):
        self.memory, self.segment, self.lag, self.steps = memory, segment, lag, steps
        self.last: tuple[torch.Tensor, ...] | None = None
        self.number = next(_numbers)
        _ledgers[self.number] = self

    @classmethod
    def of(cls, memory: KNNMemory, settings: dict[str, Any]) -> Self:
        """That of a layer with `settings`."""
        return cls(memory, settings["segment"], 0 if settings["overlap"] else settings["window"])

    def token(self) -> torch.Tensor:
        """Names the state of the memory now."""
        return torch.tensor([self.number, self.steps])

    def step(
        self, steps: int, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, start: torch.Tensor
    ) -> None:
        """Write what the window has completed, then clear the rows that start; once, however often it is asked.

        Raises
        ------
        ArgumentError
            The memory has gone on from the state that is asked for.
        """
        call = (keys, values, position, start)
        if steps == self.steps - 1 and self.last is not None and all(map(same, call, self.last)):
            return
        self.newest(
            steps,
            "Memory goes one way: to continue one past twice, take copy.deepcopy(memory) before it is first continued; "
            "where gradients are checkpointed, run backward before the next call, and let no row complete a segment "
            "but at the end of a call.",
        )
        self._write(keys, values, position)
        self.memory.clear(start.nonzero().flatten().tolist())
        self.steps, self.last = steps + 1, tuple(t.detach().clone() for t in call)  # a compiled graph reuses its own

    def newest(self, steps: int, remedy: str) -> None:
        """The memory is as it was after so many steps.

        Raises
        ------
        ArgumentError
        """
        if steps != self.steps:
            expected = f"the latest state of this memory, after {self.steps} steps"
            raise ArgumentError("memory", expected, f"the state after {steps}, whose memory has gone on", remedy)

    def _write(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        """Write every complete segment of the window, of all rows at once or, where that is refused, of none."""
        if keys.device.type in FOLLOWED_TO and self.memory.index == "exact" and self.memory.device != keys.device:
            self.memory = self.memory.to(keys.device)
        begins, window = position.cpu().numpy(), keys.shape[2]
        held = begins // self.segment * self.segment - self.lag  # tokens memory should hold
        due = np.maximum(held - self.memory.written, 0)
        if not due.any():
            return
        rows, width = np.flatnonzero(due), int(due.max())
        columns = (held - begins + window)[rows, None] - width + np.arange(width)  # the newest `width` up to `held`
        mask = np.arange(width) >= width - due[rows, None]
        if (columns[0] == columns).all() and len(rows) == len(begins):  # rows in step: a view, not a copy
            chosen = slice(int(columns[0, 0]), int(columns[0, 0]) + width)
            pairs = keys[:, :, chosen], values[:, :, chosen]
        else:
            index = torch.from_numpy(np.maximum(columns, 0))[:, None, :, None].to(keys.device)
            pairs = tuple(torch.take_along_dim(a[rows.tolist()], index, dim=2) for a in (keys, values))
        self.memory.write(*pairs, rows=rows.tolist(), mask=None if mask.all() else mask)

    def copy(self, rows: list[int]) -> Self:
        """A ledger of its own over a memory with these rows."""
        return type(self)(self.memory.select(rows), self.segment, self.lag, self.steps)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every number."""
    return a.shape == b.shape and torch.equal(a, b)


@torch.library.custom_op("perdure::recall", mutates_args=())
def recall(
    token: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    start: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring the memory up to its window, and retrieve.

    Parameters
    ----------
    token : int64 tensor (2,), in main memory
    queries : tensor (rows, heads, q, d)
    keys, values : tensors (rows, heads, window, d), (rows, heads, window, dv)
        The newest tokens of every row, complete segments of which are written first.
    position : int64 tensor (rows,)
        Tokens each row has read, 0 where it starts.
    start : bool tensor (rows,)
        Rows that forget everything before they are searched.
    k : int

    Returns
    -------
    token : int64 tensor (2,)
        Names the state after this step.
    keys, values : tensors (rows, heads, q, k, d), (rows, heads, q, k, dv)
    found : bool tensor (rows, heads, q, k)
    """
    number, steps = token.tolist()
    ledger = _ledgers.get(number)
    if ledger is None:
        raise ArgumentError("memory", "a live memory", f"number {number}, which is gone", "Keep the state you pass.")
    ledger.step(steps, keys, values, position, start)
    near = ledger.memory.search(queries, k)
    return torch.tensor([number, steps + 1]), near.keys, near.values, near.positions >= 0


@recall.register_fake
def _(token, queries, keys, values, position, start, k):
    found = queries.new_empty((*queries.shape[:3], k), dtype=torch.bool)
    retrieved = (queries.new_empty((*queries.shape[:3], k, a.shape[-1])) for a in (keys, values))
    return torch.empty_like(token), *retrieved, found
