"""The memory of one attention layer: at which distance it is seen, what it reads, and what it is about to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...core import checks
from ...core.attention import Reading
from ...memory.knn import KNNMemory
from .mixing import read_memory
from .positions import Angles, Rotary


class LayerMemory:
    """Up to three `KNNMemory`, made when the first segment shows how many rows and heads there are.

    What a row reads first goes to `first`, and stays. The rest goes to `near`, which keeps keys as they were rotated
    where they stood, and what leaves there goes to `far`, which turns them to position 0. A query reads `far` as if it
    stood at position `distance`, and all readings become one by their log-sum-exp.

    Parameters
    ----------
    index : int
        Which layer of the model.
    rotary : Rotary or None
        None where the model has no rotary embedding; then nothing is ever turned.
    near, far : int
        Capacities; 0 is none at all.
    distance : int
        At which `far` is seen.
    sinks : int
        Capacity of `first`.
    k : int
        Memories a query retrieves from each of `near` and `far`.
    settings : dict
        Further arguments of `KNNMemory`.
    """

    def __init__(
        self,
        index: int,
        rotary: Rotary | None,
        *,
        near: int,
        far: int,
        distance: int,
        sinks: int,
        k: int,
        settings: dict[str, Any],
    ):
        self.index, self.rotary, self.distance, self.k, self.settings = index, rotary, distance, k, settings
        self.capacities = {"first": sinks, "near": near, "far": far}
        self.stores: dict[str, KNNMemory] = {}
        self.staged: tuple[torch.Tensor, torch.Tensor, Angles | None] | None = None

    @property
    def empty(self) -> bool:
        """Whether no row remembers anything."""
        return not any(store.tokens.any() for store in self.stores.values())

    @property
    def tokens(self) -> np.ndarray:
        """Tokens each row remembers, int64 (rows,)."""
        held = [store.tokens for store in self.stores.values()]
        return np.sum(held, axis=0) if held else np.zeros(0, np.int64)

    @property
    def written(self) -> np.ndarray:
        """Tokens in each row's whole history, int64 (rows,)."""
        first = self.stores["first"].tokens if "first" in self.stores else 0
        return first + self.stores["near" if "near" in self.stores else "far"].written

    def read(
        self,
        query: torch.Tensor,
        angles: Angles | None,
        positions: torch.Tensor,
        scale: float,
        before: int | np.ndarray = 0,
    ) -> list[Reading]:
        """Attention over the nearest memories of `query` (rows, query_heads, q, dim), rotated by `angles`.

        A reading for each store; `neighbours` tell positions in everything the row has read, but for the first tokens,
        which every query reads. There may be several times as many rows as are remembered: each row of memory then
        serves that many, which follow one another. `before`, one number or (rows,), is added to their positions.
        """
        readings = []
        for name, store in self.stores.items():
            k = self.capacities[name] if name == "first" else self.k
            reading = read_memory(store, self._seen_from(name, query, angles, positions), k, scale)
            found = reading.neighbours.positions
            shift = np.repeat(before, len(found) // np.size(before)) + self.capacities["first"]
            later = torch.where(found >= 0, found + torch.from_numpy(shift).to(found.device)[:, None, None, None], -1)
            neighbours = None if name == "first" else replace(reading.neighbours, positions=later)
            readings.append(replace(reading, neighbours=neighbours))
        return readings

    def stage(self, key: torch.Tensor, value: torch.Tensor, angles: Angles | None) -> None:
        """Hold a segment (rows, heads, n, dim), rotated by `angles`, to be written once the whole model has read."""
        key, value = key.detach(), value.detach()
        checks.measurable(keys=key)
        checks.finite(values=value)
        self.staged = key, value, angles

    def write(self, mask: torch.Tensor | None, positions: torch.Tensor) -> None:
        """Store the segment staged, which stands at `positions` (rows or 1, n), but for padding (False in `mask`)."""
        (key, value, angles), self.staged = self.staged, None
        rows, heads, n, dim = key.shape
        if not self.stores:
            sizes = {"rows": rows, "heads": heads, "dim": dim, "value_dim": value.shape[3], **self.settings}
            self.stores = {name: KNNMemory(capacity=c, **sizes) for name, c in self.capacities.items() if c}
        present = np.ones((rows, n), bool) if mask is None else mask.cpu().numpy()
        if "first" in self.stores:
            first = self.stores["first"]
            opening = present & (present.cumsum(axis=1) <= self.capacities["first"] - first.tokens[:, None])
            if opening.any():
                seen_alike = key if "near" in self.stores else self._turned(key, angles, 0)
                first.write(seen_alike, value, mask=opening)
                present = present & ~opening
        if "near" not in self.stores:
            self.stores["far"].write(self._turned(key, angles, 0), value, mask=present)
            return
        tags = positions.expand(rows, n).cpu().numpy()
        if "far" in self.stores:
            self._hand_on(key, value, angles, present)
        self.stores["near"].write(key, value, mask=present, tags=tags)

    def successor(self) -> LayerMemory:
        """An empty memory for what follows; it keeps first tokens only where nothing came before."""
        sinks = self.capacities["first"] if self.empty else 0
        capacities = {name: self.capacities[name] for name in ("near", "far")}
        sizes = {**capacities, "distance": self.distance, "sinks": sinks, "k": self.k}
        return LayerMemory(self.index, self.rotary, **sizes, settings=self.settings)

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of what row `rows[i]` was."""
        self.stores = {name: store.select(rows) for name, store in self.stores.items()}

    def clear(self, rows: Sequence[int] | None) -> None:
        """Forget `rows`; None is all, and any number of rows may come next."""
        for store in self.stores.values():
            store.clear(rows)
        if rows is None:
            self.stores = {}

    def _hand_on(self, key: torch.Tensor, value: torch.Tensor, angles: Angles | None, present: np.ndarray) -> None:
        """Write to `far` what leaves `near` when the tokens `present` (rows, n) of a segment come."""
        near, far = self.stores["near"], self.stores["far"]
        leaving = np.maximum(near.tokens + present.sum(axis=1) - near.capacity, 0)
        old = np.minimum(leaving, near.tokens)
        if old.any():
            ahead = np.arange(old.max())
            oldest = near.at(np.where(ahead < old[:, None], (near.written - near.tokens)[:, None] + ahead, -1))
            keys, values = (torch.from_numpy(a).to(key) for a in (oldest.keys, oldest.values))
            if self.rotary is not None:
                stood = torch.from_numpy(oldest.tags).clamp(min=0).to(key.device)
                keys = self._turned(keys, self.rotary.angles(stood, keys), 0)
            far.write(keys, values, mask=oldest.positions >= 0)
        at_once = present & (present.cumsum(axis=1) <= (leaving - old)[:, None])
        if at_once.any():
            far.write(self._turned(key, angles, 0), value, mask=at_once)

    def _seen_from(
        self, name: str, query: torch.Tensor, angles: Angles | None, positions: torch.Tensor
    ) -> torch.Tensor:
        """`query` at the distance from which the keys of a store are seen."""
        if self.rotary is None or name == "near" or "far" not in self.stores:
            return query
        if name == "far" or "near" not in self.stores:
            return self._turned(query, angles, self.distance)
        if int(positions.max()) <= self.distance:  # the first tokens, still as near as they are
            return query
        return self.rotary.turn(query, angles, self.rotary.angles(positions.clamp(max=self.distance), query))

    def _turned(self, vectors: torch.Tensor, angles: Angles | None, position: int) -> torch.Tensor:
        """`vectors`, rotated by `angles`, as if they stood at `position`."""
        if self.rotary is None:
            return vectors
        new = self.rotary.angles(torch.full((1, 1), position, device=vectors.device), vectors)
        return self.rotary.turn(vectors, angles, new)
