"""One attention layer's two readings, of the text at hand and of its memory, and how they become one output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ...backends.errors import ArgumentError
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
    rows, heads, n = key.shape[:3]
    group = query.shape[1] // heads
    allowed = as_boolean(mask, query.shape[2], n, query.device)
    if allowed is not None:
        allowed = allowed.expand(-1, group, -1, -1).reshape(allowed.shape[0], 1, -1, n)
    reading = attend(query.reshape(rows, heads, -1, query.shape[3]), key, value, scale=scale, mask=allowed)
    return Reading(reading.output.reshape(*query.shape[:3], -1), reading.lse.reshape(query.shape[:3]))


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


def read_whole(memory: KNNMemory, query: torch.Tensor, scale: float, keep: int) -> Reading:
    """Attention over everything that is held, for every query (rows, query_heads, q, dim), and the `keep` nearest.

    For many queries over a few hundred tokens this costs a fraction of what finding the nearest of them does.
    """
    oldest = held(memory, memory.tokens, query)
    times = query.shape[0] // memory.rows
    there = torch.from_numpy(oldest.positions).to(query.device).repeat_interleave(times, dim=0)  # (rows, n)
    keys, values = (a.repeat_interleave(times, dim=0) for a in (oldest.keys, oldest.values))
    mask = (there >= 0)[:, None, None].expand(-1, 1, query.shape[2], -1)
    reading = read_locally(query, keys, values, mask, scale)
    if not keep or not there.shape[1]:
        return reading
    rows, heads, q, dim = query.shape
    scores = query.detach().reshape(rows, keys.shape[1], -1, dim) @ keys.transpose(2, 3)
    scores = scores.reshape(rows, heads, q, -1).masked_fill(~mask, -torch.inf)
    scores, nearest = scores.topk(min(keep, scores.shape[-1]), dim=-1)
    positions = there[:, None, None].expand(rows, heads, q, -1).gather(-1, nearest)
    return replace(reading, neighbours=Neighbours(scores, positions))


def held(memory: KNNMemory, oldest: np.ndarray, beside: torch.Tensor) -> Neighbours:
    """The `oldest` (rows,) tokens of every row, those of a row with fewer followed by position -1.

    Keys and values come as tensors like `beside`.
    """
    ahead = np.arange(oldest.max(initial=0))
    positions = (memory.written - memory.tokens)[:, None] + ahead
    return memory.at(np.where(ahead < oldest[:, None], positions, -1), beside.detach())
