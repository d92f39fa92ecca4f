"""What every token drew from memory: which memories, with how much of its attention, in which layer and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...backends.errors import ArgumentError
from ...core import checks
from ...core.attention import Reading

NOTHING: Sequence[int] = ()  # what a row that remembers nothing has read


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


@dataclass
class Segment:
    """Tokens that the model was given at once, and each layer's reading of them."""

    ids: torch.Tensor | None  # (rows, n), where it was given ids
    present: torch.Tensor | None  # bool (rows, n), where some are padding
    rows: int
    chain: Chain
    parts: list[Part]


@dataclass
class Chain:
    """Segments that went through one cache, or one that had none."""

    first: int  # number of its first token
    cached: int  # tokens that its cache held already
    earlier: list[int]  # those of them that are no padding, in each row
    read: list[tuple[Sequence[int], int]]  # of each row remembered, the ids of what it had read, and how many they were
    caching: bool


class Trace:
    """A record of readings, kept while `ModelMemory.tracing` lasts.

    Parameters
    ----------
    keep : int
        How many of the nearest memories to keep for each token, layer and head; 12 bytes each. Those first tokens that
        every query reads are left out.

    Attributes
    ----------
    reordered : bool
        Whether rows of the cache changed places, as beams do; then a row of the trace is no one text.
    """

    def __init__(self, keep: int = 1):
        self.keep, self.reordered = checks.count("keep", keep), False
        self._segments: list[Segment] = []
        self._chains: list[Chain] = []
        self._numbered: list[tuple[int, int]] = []  # of each token, its segment and its place there
        self._cache: Any = None  # that of the newest segment, until the trace ends

    def begin(
        self,
        shape: tuple[int, int],
        ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        history: Sequence[Sequence[int]],
        cache: Any = None,
        earlier: list[int] | None = None,
    ) -> None:
        """The model is about to be given tokens of this `shape` (rows, n).

        `ids` where it is given ids, False in `mask` padding. Their rows remember what has the ids `history`, and
        `cache` holds `earlier` tokens of each row.
        """
        rows, n = shape
        held = 0 if cache is None else cache.get_seq_length()
        if cache is None or cache is not self._cache or not held:
            self.settle()
            read = [(each, len(each)) for each in history]
            self._chains.append(Chain(len(self._numbered), held, earlier or [held] * rows, read, cache is not None))
        self._cache = cache
        self.settle()
        kept = None if ids is None else ids.cpu()
        self._numbered += [(len(self._segments), at) for at in range(n)]
        self._segments.append(Segment(kept, None if mask is None else mask.cpu(), rows, self._chains[-1], []))

    def take_back(self) -> None:
        """The newest segment was not read after all."""
        segment = self._segments.pop()
        self._numbered = [numbered for numbered in self._numbered if numbered[0] < len(self._segments)]
        if not any(other.chain is segment.chain for other in self._segments):
            self._chains.pop()
        self._cache = None

    def settle(self) -> None:
        """Take tokens back that the cache at hand has been made to forget, such as drafts that were rejected."""
        held = 0 if self._cache is None else self._cache.get_seq_length()
        if held:
            chain = self._chains[-1]
            del self._numbered[chain.first + max(held - chain.cached, 0) :]
            self.reordered |= any(getattr(layer, "reordered", False) for layer in self._cache.layers)

    def end(self) -> None:
        """No more is traced."""
        self.settle()
        self._cache = None

    @property
    def tokens(self) -> int:
        """Tokens the model was given meanwhile, but for drafts that were rejected; they are numbered from 0."""
        self.settle()
        return len(self._numbered)

    @property
    def rows(self) -> int:
        """Rows the model was given."""
        return max((segment.rows for segment in self._segments), default=0)

    def ids(self, row: int = 0) -> list[int]:
        """The tokens of one `row` that the model was given, padding too; -1 where it was given embeddings."""
        self.settle()
        return [self._id(number, row) for number in range(len(self._numbered))]

    def text(self, row: int = 0) -> tuple[list[int], dict[int, tuple[int, int, int]]]:
        """Ids of all that a `row` can have drawn from, and where in them the memories of each segment are.

        For each segment: how many memories stand from which index on, and the index from which all others do. An id
        is -1 where it is not known.
        """
        self.settle()
        longest: dict[int, tuple[Sequence[int], int]] = {}
        own = [self._read(chain, row) for chain in self._chains]
        for read, n in own:
            longest[id(read)] = read, max(n, longest.get(id(read), (read, 0))[1])
        document: list[int] = []
        starts: dict[int, int] = {}
        for key, (read, n) in longest.items():
            starts[key] = len(document)
            document += read[:n]
        found: dict[int, tuple[int, int, int]] = {}
        ends = [chain.first for chain in self._chains[1:]] + [len(self._numbered)]
        for chain, (read, n), end in zip(self._chains, own, ends, strict=True):
            where = n, starts[id(read)], len(document)
            found |= {i: where for i, segment in enumerate(self._segments) if segment.chain is chain}
            if chain.caching and row < len(chain.earlier):
                document += [-1] * chain.earlier[row]
                document += [self._id(t, row) for t in range(chain.first, end) if self._present(t, row)]
        return document, found

    def _read(self, chain: Chain, row: int) -> tuple[Sequence[int], int]:
        rows = max(len(chain.earlier), 1)
        return chain.read[min(row, rows - 1) * len(chain.read) // rows] if chain.read else (NOTHING, 0)

    def _id(self, token: int, row: int) -> int:
        segment, at = self._numbered[token]
        ids = self._segments[segment].ids
        return -1 if ids is None or row >= len(ids) else int(ids[row, at])

    def _present(self, token: int, row: int) -> bool:
        segment, at = self._numbered[token]
        present = self._segments[segment].present
        return present is None or bool(present[row, at])

    def record(
        self,
        layer: int,
        readings: list[Reading],
        joint_lse: torch.Tensor,
        scale: float,
        share: torch.Tensor | None = None,
    ) -> None:
        """Keep the nearest of what a `layer` read.

        `readings` are (rows, heads, q), each of weight exp(`scale` score - `joint_lse`), of which each head takes a
        `share` (heads,).
        """
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
        self._segments[-1].parts.append(Part(layer, *kept))

    def draws(self, token: int, row: int = 0) -> list[Draw]:
        """What `token` of a `row` drew from, each memory with its strongest use in any layer and head, strongest first.

        Raises
        ------
        ArgumentError
            A token or row that was not traced.
        """
        if not 0 <= checks.count("token", token, least=0) < self.tokens:
            raise ArgumentError("token", f"a number below {self.tokens}", str(token), "Name a token that was traced.")
        segment, at = self._numbered[token]
        rows = self._segments[segment].rows
        if checks.count("row", row, least=0) >= rows:
            raise ArgumentError("row", f"a number below {rows}", str(row), "Name a row that was traced.")
        strongest: dict[int, Draw] = {}
        for part in self._segments[segment].parts:
            positions, weights = part.positions[row, :, at], part.weights[row, :, at]
            for head, nearest in np.argwhere(positions >= 0):
                weight, score = float(weights[head, nearest]), float(part.scores[row, head, at, nearest])
                draw = Draw(int(positions[head, nearest]), weight, part.layer, int(head), score)
                if draw.position not in strongest or strongest[draw.position].weight < draw.weight:
                    strongest[draw.position] = draw
        return sorted(strongest.values(), key=lambda draw: -draw.weight)

    def told(self, row: int = 0) -> tuple[list[int], Callable[[int], list[Draw]]]:
        """What `text` gives of a `row`, and what gives the draws of a token with positions in it."""
        document, places = self.text(row)

        def draws(token: int) -> list[Draw]:
            found = self.draws(token, row)
            known, start, others = places[self._numbered[token][0]]
            return [
                replace(draw, position=draw.position + (start if draw.position < known else others - known))
                for draw in found
            ]

        return document, draws

    def usual(self, row: int = 0) -> dict[tuple[int, int], float]:
        """The mean weight, over all tokens of a `row`, of what each (layer, head) drew from its nearest memory."""
        total: dict[tuple[int, int], float] = {}
        for part in (part for segment in self._segments for part in segment.parts):
            for head, weight in enumerate(part.weights[row, :, :, 0].sum(axis=1)):
                total[part.layer, head] = total.get((part.layer, head), 0.0) + float(weight)
        return {where: weight / self.tokens for where, weight in total.items()}
