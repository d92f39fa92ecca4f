"""The memory of one attention layer: where its keys stand, what it reads, and what it is about to write."""

from __future__ import annotations

from typing import Any

import torch

from ...core import checks
from ...core.attention import Reading
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
    settings : dict
        `capacity` and `index` of the `KNNMemory`.
    """

    def __init__(self, index: int, rotary: Rotary | None, distance: int | None, k: int, settings: dict[str, Any]):
        self.index, self.k, self.settings = index, k, settings
        self.rotary = None if distance is None else rotary
        self.distance = distance
        self.store: KNNMemory | None = None
        self.staged: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, query: torch.Tensor, angles: Angles | None, scale: float) -> Reading:
        """Attention of `query` (rows, query_heads, q, dim), rotated by `angles`, over its nearest memories."""
        if self.rotary is not None:
            query = self.rotary.turn(query, angles, self._angles(self.distance, query))
        return read_memory(self.store, query, self.k, scale)

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
        if self.store is None:
            rows, heads, _, dim = key.shape
            self.store = KNNMemory(rows, heads, dim, value_dim=value.shape[3], **self.settings)
        self.store.write(key, value, mask=mask)

    def _angles(self, position: int, like: torch.Tensor) -> Angles:
        return self.rotary.angles(torch.full((1, 1), position, device=like.device), like)
