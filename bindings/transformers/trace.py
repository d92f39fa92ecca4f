"""What every token drew from memory: which memories, with how much of its attention, in which layer and head."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch

from ...backends.errors import ArgumentError
from ...core import checks
from ...core.attention import Reading


@dataclass(frozen=True)
class Draw:
    """The strongest use of one memory by one token."""

    position: int  # of the memory, among all tokens its row read since the last clear
    weight: float  # its share of that head's attention, the text at hand included
    layer: int
    head: int
    score: float  # what the weight comes from: the scaled product of query and key


@dataclass(frozen=True)
class Part:
    """One layer's reading of one segment: all arrays (rows, heads, q, keep), the nearest memory first."""

    layer: int
    positions: np.ndarray
    weights: np.ndarray
    scores: np.ndarray


class Trace:
    """A record of readings, kept while `ModelMemory.tracing` lasts.

    Parameters
    ----------
    keep : int
        How many of the nearest memories to keep for each token, layer and head; 12 bytes each. Those first tokens that
        every query reads are left out.

    Attributes
    ----------
    tokens : int
        Tokens the model was given meanwhile; they are numbered from 0.
    history : list of list of int
        Ids of all that each row had read and remembered by then.
    """

    def __init__(self, keep: int = 1):
        self.keep, self.tokens = checks.count("keep", keep), 0
        self._starts: list[int] = []
        self._segments: list[list[Part]] = []
        self._ids: list[torch.Tensor] = []
        self._padding: list[torch.Tensor] = []
        self.history: list[list[int]] = []

    def begin(self, n: int, ids: torch.Tensor | None, mask: torch.Tensor | None, history: list[list[int]]) -> None:
        """The model is about to be given `n` tokens; `ids` (rows, n) where it is given ids, False in `mask` padding."""
        self._starts.append(self.tokens)
        self._segments.append([])
        self._ids.append(torch.empty(0, n, dtype=torch.int64) if ids is None else ids.cpu())
        self._padding.append(torch.zeros_like(self._ids[-1], dtype=torch.bool) if mask is None else ~mask.cpu())
        self.tokens, self.history = self.tokens + n, list(history)

    @property
    def rows(self) -> int:
        """Rows the model was given."""
        return max((len(ids) for ids in self._ids), default=0)

    def ids(self, row: int = 0, padding: bool = True) -> list[int]:
        """The tokens of one `row` that the model was given, with `padding` or without; -1 where it was embeddings."""
        parts = [
            ids[row] if len(ids) > row else torch.full(pads.shape[1:], -1)
            for ids, pads in zip(self._ids, self._padding, strict=True)
        ]
        if not padding:
            parts = [
                part[~pads[row]] if len(pads) > row else part for part, pads in zip(parts, self._padding, strict=True)
            ]
        return [token for part in parts for token in part.tolist()]

    def record(
        self,
        layer: int,
        readings: list[Reading],
        joint_lse: torch.Tensor,
        scale: float,
        share: torch.Tensor | None = None,
    ) -> None:
        """Keep the nearest of a `layer`'s `readings` (rows, heads, q), of weight exp(`scale` score - `joint_lse`), of
        which each head takes a `share` (heads,)."""
        near = [reading.neighbours for reading in readings if reading.neighbours is not None]
        if not near:
            return
        positions, scores = (
            torch.cat(parts, dim=-1) for parts in zip(*((n.positions, n.scores) for n in near), strict=True)
        )
        scores, order = scores.detach().float().topk(min(self.keep, scores.shape[-1]), dim=-1)
        positions = positions.gather(-1, order)
        scores = scale * scores
        weights = torch.where(positions >= 0, torch.exp(scores - joint_lse.detach().float()[..., None]), 0)
        weights = weights if share is None else weights * share[:, None, None]
        kept = (array.cpu().numpy() for array in (positions.int(), weights, scores))
        self._segments[-1].append(Part(layer, *kept))

    def draws(self, token: int, row: int = 0) -> list[Draw]:
        """What `token` of a `row` drew from, each memory with its strongest use in any layer and head, strongest first.

        Raises
        ------
        ArgumentError
            A token that was not traced.
        """
        if not 0 <= checks.count("token", token, least=0) < self.tokens:
            raise ArgumentError("token", f"a number below {self.tokens}", str(token), "Name a token that was traced.")
        segment = bisect.bisect_right(self._starts, token) - 1
        at = token - self._starts[segment]
        strongest: dict[int, Draw] = {}
        for part in self._segments[segment]:
            positions, weights = part.positions[row, :, at], part.weights[row, :, at]
            for head, nearest in np.argwhere(positions >= 0):
                weight, score = float(weights[head, nearest]), float(part.scores[row, head, at, nearest])
                draw = Draw(int(positions[head, nearest]), weight, part.layer, int(head), score)
                if draw.position not in strongest or strongest[draw.position].weight < draw.weight:
                    strongest[draw.position] = draw
        return sorted(strongest.values(), key=lambda draw: -draw.weight)

    def usual(self, row: int = 0) -> dict[tuple[int, int], float]:
        """The mean weight, over all tokens of a `row`, of what each (layer, head) drew from its nearest memory."""
        total: dict[tuple[int, int], float] = {}
        for part in (part for segment in self._segments for part in segment):
            for head, weight in enumerate(part.weights[row, :, :, 0].sum(axis=1)):
                total[part.layer, head] = total.get((part.layer, head), 0.0) + float(weight)
        return {where: weight / self.tokens for where, weight in total.items()}
