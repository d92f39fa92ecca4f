"""The memory of one attention layer: where its keys stand, what it reads, and what it is about to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...core import checks
from ...core.attention import Reading, merge
from ...memory.knn import KNNMemory
from .mixing import read_memory
from .positions import Angles, Rotary


class LayerMemory:
    """One `KNNMemory`, made when the first segment shows how many rows and heads there are.

    Parameters
    ----------
    index : int
        Which layer of the model.
    rotary : Rotary or None
        None where the model has no rotary embedding.
    distance : int or None
        None leaves keys as they were rotated where they stood. A number turns every key to position 0, and every query
        that reads them to position `distance`.
    sinks : int
        How many of a row's first tokens are kept for good, and read by every query.
    settings : dict
        `capacity` and `index` of the `KNNMemory`.
    """

    def __init__(
        self,
        index: int,
        rotary: Rotary | None,
        distance: int | None,
        k: int,
        sinks: int,
        settings: dict[str, Any],
    ):
        self.index, self.k, self.sinks, self.settings = index, k, sinks, settings
        self.rotary = None if distance is None else rotary
        self.distance = distance
        self.store: KNNMemory | None = None
        self.first: KNNMemory | None = None
        self.staged: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def stores(self) -> list[KNNMemory]:
        """What there is so far: the store, and the first tokens' own."""
        return [store for store in (self.store, self.first) if store is not None]

    @property
    def empty(self) -> bool:
        """Whether no row remembers anything."""
        return not any(store.tokens.any() for store in self.stores)

    def read(self, query: torch.Tensor, angles: Angles | None, scale: float) -> Reading:
        """Attention of `query` (rows, query_heads, q, dim), rotated by `angles`, over its nearest memories."""
        if self.rotary is not None:
            query = self.rotary.turn(query, angles, self._angles(self.distance, query))
        reading = read_memory(self.store, query, self.k, scale)
        if self.first is None:
            return reading
        found = reading.neighbours.positions
        neighbours = replace(reading.neighbours, positions=torch.where(found >= 0, found + self.sinks, -1))
        return merge(replace(reading, neighbours=neighbours), read_memory(self.first, query, self.sinks, scale))

    def stage(self, key: torch.Tensor, value: torch.Tensor, angles: Angles | None) -> None:
        """Hold a segment (rows, heads, n, dim) to be written once the whole model has read."""
        key, value = key.detach(), value.detach()
        if self.rotary is not None:
            key = self.rotary.turn(key, angles, self._angles(0, key))
        checks.measurable(keys=key)
        checks.finite(values=value)
        self.staged = key, value

    def write(self, mask: torch.Tensor | None) -> None:
        """Store the segment staged, but for its padding (False in `mask`, (rows, n))."""
        (key, value), self.staged = self.staged, None
        rows, heads, n, dim = key.shape
        if self.store is None:
            sizes = {"rows": rows, "heads": heads, "dim": dim, "value_dim": value.shape[3]}
            self.store = KNNMemory(**sizes, **self.settings)
            if self.sinks:
                self.first = KNNMemory(**sizes, **self.settings | {"capacity": self.sinks})
        if self.first is not None and (self.first.tokens < self.sinks).any():
            mask = torch.ones(rows, n, dtype=torch.bool) if mask is None else mask.cpu()
            wanting = torch.from_numpy(self.sinks - self.first.tokens)[:, None]
            opening = mask & (mask.cumsum(dim=1) <= wanting)
            self.first.write(key, value, mask=opening.numpy())
            mask = mask & ~opening
        self.store.write(key, value, mask=mask)

    def clear(self, rows: Sequence[int] | None) -> None:
        """Forget `rows`; None is all, and any number of rows may come next."""
        if rows is None:
            self.store = self.first = None
        for store in self.stores:
            store.clear(rows)

    def _angles(self, position: int, like: torch.Tensor) -> Angles:
        return self.rotary.angles(torch.full((1, 1), position, device=like.device), like)
