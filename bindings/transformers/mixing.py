"""One attention layer's two readings, of the text at hand and of its memory, and how they become one output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...backends.errors import ArgumentError
from ...backends.torch import fused
from ...core.attention import Reading, attend
from ...core.retrieval import Neighbours
from ...memory.knn import KNNMemory


def read_locally(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> Reading:
    """Causal attention over the keys at hand, with its log-sum-exp.

    Parameters
    ----------
    query : tensor (rows, query_heads, q, dim)
    key, value : tensors (rows, heads, n, dim)
        query head h attends to head h // (query_heads // heads): heads are shared, not copied.
    mask : tensor (rows or 1, 1, q, n), or None
        As the model made it: boolean, or added to the scores; None is plain causal order.
    """
    q, n = query.shape[2], key.shape[2]
    causal = mask is None and q == n
    allowed = None if causal else as_boolean(mask, q, n, query.device)
    return read_grouped(query, key, value, scale, allowed, causal)


def read_grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool
) -> Reading:
    """Attention of queries (rows, query_heads, q, dim) over keys (rows, heads, n, dim) that groups of heads share.

    What PyTorch has fused for it is asked first, and not checked beyond what it returns; `mask`, (rows or 1, 1, q or 1,
    n), is None where `causal`. Where all queries may see the same, those of a group are so many more of one head.
    """
    rows, heads, n = key.shape[:3]
    q, dim = query.shape[2:]
    causal = causal and n > 1
    if causal or (mask is not None and mask.shape[2] > 1):
        asked, key, value = query.reshape(rows, heads, -1, q, dim), key[:, :, None], value[:, :, None]
        mask = None if mask is None else mask[:, :, None]
    else:
        asked = query.reshape(rows, heads, -1, dim)
    found = fused(asked, key, value, scale, mask, causal)
    if found is None:
        mask = as_boolean(None, q, n, query.device) if causal else mask
        reading = attend(asked, key, value, scale=scale, mask=mask)
        found = reading.output, reading.lse
    return Reading(found[0].reshape(*query.shape[:3], -1), found[1].reshape(query.shape[:3]))


def as_boolean(mask: torch.Tensor | None, q: int, n: int, device: torch.device) -> torch.Tensor | None:
    """True where a query may attend, (rows or 1, 1, q, n); None where all may.

    Raises
    ------
    ArgumentError
        A mask that does more than allow and forbid.
    """
    if mask is None:
        return None if q == 1 else torch.ones(1, 1, q, n, dtype=torch.bool, device=device).tril(n - q)
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min)).all()):
        raise ArgumentError(
            "attention_mask", "a mask that allows or forbids", "one that adds to scores", "Pass a boolean mask."
        )
    return allowed


def read_memory(memory: KNNMemory, query: torch.Tensor, k: int, scale: float) -> Reading:
    """Attention over the k nearest memories of every query (rows, query_heads, q, dim).

    The search is exact and outside of autograd. Where the queries need gradients, what it found is scored once more
    within autograd, so gradients reach the queries through the scores, and none reaches the stored pairs.
    """
    rows, heads, q, dim = query.shape
    if rows != memory.rows:  # several rows that continue the same one are so many queries more
        folded = query.reshape(memory.rows, -1, heads, q, dim).transpose(1, 2).reshape(memory.rows, heads, -1, dim)
        reading = read_memory(memory, folded, k, scale)
        near = reading.neighbours
        near = replace(near, scores=unfold(near.scores, rows), positions=unfold(near.positions, rows), tags=None)
        return Reading(unfold(reading.output, rows), unfold(reading.lse[..., None], rows)[..., 0], near)
    if not (torch.is_grad_enabled() and query.requires_grad):
        return memory.read(query, k, scale)
    found = memory.search(query.detach(), k)
    reading = attend(query[..., None, :], found.keys, found.values, None, scale, (found.positions >= 0)[..., None, :])
    return Reading(reading.output[..., 0, :], reading.lse[..., 0], replace(found, keys=None, values=None))


def unfold(folded: torch.Tensor, rows: int) -> torch.Tensor:
    """(fewer rows, heads, times x q, ...) -> (rows, heads, q, ...), where `rows` is `times` as many."""
    fewer, heads, many, width = folded.shape
    times = rows // fewer
    return folded.reshape(fewer, heads, times, many // times, width).transpose(1, 2).reshape(rows, heads, -1, width)


@dataclass(frozen=True)
class Whole:
    """What is read whole: all that some stores hold.

    Attributes
    ----------
    keys, values : tensors (rows, heads, n, dim)
    there : bool tensor (rows, n), or None
        False fills up a row that holds less than others; None where no row does.
    positions : int64 tensor (rows, n)
        -1 where there is nothing, or nothing that a trace is to tell.
    """

    keys: torch.Tensor
    values: torch.Tensor
    there: torch.Tensor | None
    positions: torch.Tensor

    @classmethod
    def of(cls, stores: Sequence[KNNMemory], told: Sequence[bool], like: torch.Tensor) -> Whole:
        """All of some `stores`, with the positions of those whose are `told`, as `like` computes and where it is."""
        parts = [held(store, store.tokens, like) for store in stores]
        positions = [torch.from_numpy(part.positions).to(like.device) for part in parts]
        hidden = [p if t else torch.full_like(p, -1) for p, t in zip(positions, told, strict=True)]
        there = torch.cat(positions, dim=1) >= 0
        return cls(
            torch.cat([part.keys for part in parts], dim=2),
            torch.cat([part.values for part in parts], dim=2),
            None if bool(there.all()) else there,
            torch.cat(hidden, dim=1),
        )

    def repeated(self, times: int) -> Whole:
        """The same, where each row serves `times` rows that follow one another."""
        if times == 1:
            return self
        held = self.keys, self.values, self.there, self.positions
        return Whole(*(None if a is None else a.repeat_interleave(times, dim=0) for a in held))


def read_whole(whole: Whole, query: torch.Tensor, scale: float, keep: int) -> Reading:
    """Attention over everything that is held, for every query (rows, query_heads, q, dim), and the `keep` nearest.

    For many queries over a few hundred tokens this costs a fraction of what finding the nearest of them does.
    """
    rows, heads, q, dim = query.shape
    whole = whole.repeated(rows // len(whole.keys))
    mask = None if whole.there is None else whole.there[:, None, None]
    reading = read_grouped(query, whole.keys, whole.values, scale, mask, False)
    if not keep or not (told := whole.positions >= 0).any():
        return reading
    grouped = query.reshape(rows, whole.keys.shape[1], -1, q, dim)
    scores = (grouped.detach() @ whole.keys[:, :, None].mT).reshape(rows, heads, q, -1)
    scores = scores.masked_fill(~told[:, None, None], -torch.inf)
    scores, nearest = scores.topk(min(keep, scores.shape[-1]), dim=-1)
    positions = whole.positions[:, None, None].expand(rows, heads, q, -1).gather(-1, nearest)
    return replace(reading, neighbours=Neighbours(scores, positions))


def held(memory: KNNMemory, oldest: np.ndarray, beside: torch.Tensor) -> Neighbours:
    """The `oldest` (rows,) tokens of every row, those of a row with fewer followed by position -1.

    Keys and values come as tensors like `beside`.
    """
    ahead = np.arange(oldest.max(initial=0))
    positions = (memory.written - memory.tokens)[:, None] + ahead
    return memory.at(np.where(ahead < oldest[:, None], positions, -1), beside.detach())
