"""Which tokens leave a full row of a HybridMemory, what a write then changes, and how attention is noted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EVICTIONS = ("fifo", "least_attended")
FADING = 0.9  # what a write leaves of the attention noted before it
PROTECTED = 0.5  # share of the newest tokens that "least_attended" never evicts: they have had no time to be read


@dataclass(frozen=True)
class Change:
    """What a write comes to in one row, before anything is done.

    Attributes
    ----------
    row : int
    keys, values, tags : arrays (heads, n, dim), (heads, n, value_dim) and (n,)
        What is written to the exact part: behind what it holds, or `anew`.
    anew : bool
    used : array (tokens,)
        The attention noted of the tokens it then holds.
    out : array (leaving, width)
        What leaves for the signal.
    """

    row: int
    keys: np.ndarray
    values: np.ndarray
    tags: np.ndarray
    anew: bool
    used: np.ndarray
    out: np.ndarray


def faded(used: np.ndarray, new: int) -> np.ndarray:
    """The attention that tokens drew, after a write of `new` more."""
    return np.concatenate([FADING * used, np.zeros(new)])


def evicted(used: np.ndarray, leaving: int, eviction: str) -> np.ndarray:
    """Indices, ascending, of the `leaving` tokens that leave, of which 0 is the oldest and used[i] is what i drew."""
    if eviction == "fifo":
        return np.arange(leaving)
    older = max(leaving, int(used.size * (1 - PROTECTED)))
    return np.sort(np.argsort(used[:older], kind="stable")[:leaving])


def share(lse: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """e^(lse - whole), the share of a part's attention in all of it, and 0 where there is none."""
    with np.errstate(invalid="ignore"):
        return np.exp(np.where(np.isfinite(lse), lse - whole, -np.inf))
