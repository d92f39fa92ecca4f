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


@dataclass(frozen=True)
class Part:
    """One layer's reading of one segment: both arrays (rows, heads, q, keep), the nearest memory first."""

    layer: int
    positions: np.ndarray
    weights: np.ndarray


class Trace:
    """A record of readings, kept while `ModelMemory.tracing` lasts.

    Parameters
    ----------
    keep : int
        How many of the nearest memories to keep for each token, layer and head; 8 bytes each. Those first tokens that
        every query reads are left out.

    Attributes
    ----------
    tokens : int
        Tokens the model was given meanwhile; they are numbered from 0.
    """

    def __init__(self, keep: int = 1):
        self.keep, self.tokens = checks.count("keep", keep), 0
        self._starts: list[int] = []
        self._segments: list[list[Part]] = []
        self._ids: list[torch.Tensor] = []

    def begin(self, n: int, ids: torch.Tensor | None) -> None:
        """The model is about to be given `n` tokens; `ids` (rows, n) where it is given ids."""
        self._starts.append(self.tokens)
        self._segments.append([])
        self._ids.append(torch.empty(0, n) if ids is None else ids.cpu())
        self.tokens += n

    @property
    def rows(self) -> int:
        """Rows the model was given."""
        return max((len(ids) for ids in self._ids), default=0)

    def ids(self, row: int = 0) -> list[int]:
        """The tokens of one `row` that the model was given; none where it was given embeddings."""
        return [token for ids in self._ids if len(ids) > row for token in ids[row].tolist()]

    def record(self, layer: int, readings: list[Reading], joint_lse: torch.Tensor, scale: float) -> None:
        """Keep the nearest of a `layer`'s `readings` (rows, heads, q), of weight exp(`scale` score - `joint_lse`)."""
        near = [reading.neighbours for reading in readings if reading.neighbours is not None]
        if not near:
            return
        positions, scores = (
            torch.cat(parts, dim=-1) for parts in zip(*((n.positions, n.scores) for n in near), strict=True)
        )
        scores, order = scores.detach().float().topk(min(self.keep, scores.shape[-1]), dim=-1)
        positions = positions.gather(-1, order)
        weights = torch.where(positions >= 0, torch.exp(scale * scores - joint_lse.detach().float()[..., None]), 0)
        self._segments[-1].append(Part(layer, positions.int().cpu().numpy(), weights.cpu().numpy()))

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
                draw = Draw(int(positions[head, nearest]), float(weights[head, nearest]), part.layer, int(head))
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
