"""The memory of one attention layer: at which distance it is seen, what it reads, and what it is about to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...backends.errors import ArgumentError
from ...core import checks
from ...core.attention import Reading
from ...memory.knn import KNNMemory
from .mixing import Whole, held, read_memory, read_whole
from .positions import Angles, Rotary

WHOLE = ("first", "recent")  # the stores that every query reads whole
LOST = 1.0  # nats that the far ones lose at most, however many they are
SAME = 0.05  # of the largest number: what computing a key again may change, in half precision too


class LayerMemory:
    """Up to four `KNNMemory`, made when the first segment shows how many rows and heads there are.

    What a row reads first goes to `first`, and stays. The rest goes to `recent`, which every query reads whole; what
    leaves there to `near`, both of which keep keys as they were rotated where they stood; and what leaves there to
    `far`, which turns them to position 0. A query reads `far` as if it stood at position `distance`, and all readings
    become one by their log-sum-exp.

    Parameters
    ----------
    index : int
        Which layer of the model.
    rotary : Rotary or None
        None where the model has no rotary embedding; then nothing is ever turned.
    near, far : int
        Capacities of what stands at the distance it has, and of what stands at `distance`; 0 is none at all.
    distance : int
        At which `far` is seen.
    trained : int
        How many memories at `distance` the model can be taken to know what to do with. Where `far` holds n, more than
        that, all of them together weigh less: their log-sum-exp is less by log(n / trained) / 2, and at most by 1. The
        best of many keys score high by chance, and the more of them there are, the higher; but one true match in
        131,072 tokens is lost where all of them lose much more.
    sinks : int
        Capacity of `first`.
    recent : int
        Capacity of `recent`, which is part of that of `near`, or where that is none, of `far`.
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
        trained: int,
        sinks: int,
        recent: int,
        k: int,
        settings: dict[str, Any],
    ):
        self.index, self.rotary, self.distance, self.k, self.settings = index, rotary, distance, k, settings
        self.trained = trained
        self.sizes = {"near": near, "far": far, "distance": distance, "trained": trained, "recent": recent, "k": k}
        self.sinks, self.constant = sinks, not near
        recent = min(recent, near or far)
        near, far = (0, far - recent) if self.constant else (near - recent, far)
        self.capacities = {"first": sinks, "recent": recent, "near": near, "far": far}
        self.stores: dict[str, KNNMemory] = {}
        self._whole: dict[Any, Any] = {}  # what is read whole, and where it begins, until something is written
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
        return first + self.stores[self._chain[0]].written

    @property
    def _chain(self) -> list[str]:
        """The stores that a token passes through, one after another."""
        return [name for name in self.stores if name != "first"]

    def read(
        self,
        query: torch.Tensor,
        asked: torch.Tensor,
        angles: Angles | None,
        positions: torch.Tensor,
        scale: float,
        before: int | np.ndarray = 0,
        keep: int | None = 0,
        nearest: torch.Tensor | None = None,
    ) -> dict[str, Reading]:
        """Attention over the nearest memories of queries (rows, query_heads, q, dim), rotated by `angles`.

        `query` reads the recent ones, and `asked`, which may be scaled otherwise, all others.

        A reading for each store; where any are to be kept, `neighbours` tell positions in everything the row has read,
        but for the first tokens, which every query reads; of the recent ones, the `keep` nearest. Where that is None
        nothing is retrieved: only what is read whole is read. There may be several times as many rows as are
        remembered: each row of memory then serves that many, which follow one another, and whose positions `before`,
        one number or (rows,), is added to. `nearest`, as `positions`, is where queries stand for what keeps its
        distance, if that is to grow no further.
        """
        seen = self._seen(query, asked, angles, positions, nearest)
        whole = [name for name in WHOLE if name in seen]
        if len(whole) == 2 and seen["first"] is seen["recent"]:
            whole = ["first recent"]
        readings = {n: read_whole(self._held(n, query), seen[n.split()[0]], scale, keep or 0) for n in whole}
        for name in [name for name in self.stores if name not in WHOLE and keep is not None]:
            store = self.stores[name]
            readings[name] = read_memory(store, seen[name], min(self.k, store.capacity), scale)
        if "far" in readings:
            readings["far"] = self._weighed(readings["far"], scale)
        if not keep:
            return readings
        for name, reading in readings.items():
            neighbours = reading.neighbours
            if neighbours is not None:
                found = neighbours.positions
                shift = np.repeat(before, len(found) // np.size(before)) + self.capacities["first"]
                later = found + torch.from_numpy(shift).to(found.device)[:, None, None, None]
                neighbours = replace(neighbours, positions=torch.where(found >= 0, later, -1))
                readings[name] = replace(reading, neighbours=neighbours)
        return readings

    def stage(self, key: torch.Tensor, value: torch.Tensor, angles: Angles | None, again: bool = False) -> None:
        """Hold a segment (rows, heads, n, dim), rotated by `angles`, to be written once the whole model has read.

        Raises
        ------
        ArgumentError
            Another is held that came with this forward pass; or a backward pass computes `again` what is not held.
        """
        key, value = key.detach(), value.detach()
        checks.measurable(keys=key)
        checks.finite(values=value)
        if self.staged is not None and not again:
            remedy = "Attach memory to a model whose layers attend once."
            raise ArgumentError("model", f"one call of layer {self.index}", "another in the same forward pass", remedy)
        if again and (self.staged is None or not alike(key, self.staged[0])):
            remedy = (
                "With gradient checkpointing, call backward after each forward pass, before anything is remembered."
            )
            raise ArgumentError("backward", "that of the newest forward pass", "that of an earlier one", remedy)
        self.staged = key, value, angles

    def write(self, mask: torch.Tensor | None, positions: torch.Tensor) -> None:
        """Store the segment staged, which stands at `positions` (rows or 1, n), but for padding (False in `mask`)."""
        (key, value, angles), self.staged = self.staged, None
        self._whole = {}
        rows, heads, n, dim = key.shape
        if not self.stores:
            sizes = {"rows": rows, "heads": heads, "dim": dim, "value_dim": value.shape[3], **self.settings}
            self.stores = {name: KNNMemory(capacity=c, **sizes) for name, c in self.capacities.items() if c}
        present = np.ones((rows, n), bool) if mask is None else mask.cpu().numpy()
        if "first" in self.stores:
            first = self.stores["first"]
            opening = present & (present.cumsum(axis=1) <= self.capacities["first"] - first.tokens[:, None])
            if opening.any():
                seen_alike = self._turned(key, angles, 0) if self.constant else key
                first.write(seen_alike, value, mask=opening, tags=positions.expand(rows, n).cpu().numpy())
                present = present & ~opening
        self._put(self._chain, key, value, angles, positions.expand(rows, n).cpu().numpy(), present)

    def successor(self) -> LayerMemory:
        """An empty memory for what leaves a cache; it keeps first tokens only where nothing came before."""
        sinks = self.capacities["first"] if self.empty else 0
        return LayerMemory(
            self.index, self.rotary, **{**self.sizes, "sinks": sinks, "recent": 0}, settings=self.settings
        )

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Hold what another held, the states of whose stores `arrays` are, named "store.array".

        Raises
        ------
        ArgumentError
        """
        self._whole = {}
        names = {name.partition(".")[0] for name in arrays}
        for name in (known for known in self.capacities if known in names):
            state = {n.partition(".")[2]: a for n, a in arrays.items() if n.startswith(f"{name}.")}
            store = KNNMemory.from_state_dict(state)
            where = {what: self.settings.get(what) for what in ("device", "device_capacity")}
            self.stores[name] = store if where["device"] is None else store.to(**where)
        sizes = {name: store.capacity for name, store in self.stores.items()}
        if names and sizes != {name: size for name, size in self.capacities.items() if size}:
            raise ArgumentError("state", f"stores of {self.capacities}", f"{sizes}", "Pass an unaltered state.")

    def take_over(self, other: LayerMemory) -> None:
        """Hold what another of the same sizes held."""
        self.stores, self._whole = other.stores, {}

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of what row `rows[i]` was."""
        self.stores, self._whole = {name: store.select(rows) for name, store in self.stores.items()}, {}

    def clear(self, rows: Sequence[int] | None) -> None:
        """Forget `rows`; None is all, and any number of rows may come next."""
        self._whole = {}
        for store in self.stores.values():
            store.clear(rows)
        if rows is None:
            self.stores = {}

    def _put(
        self,
        chain: list[str],
        key: torch.Tensor,
        value: torch.Tensor,
        angles: Angles | None,
        stood: np.ndarray,
        present: np.ndarray,
    ) -> None:
        """Write what is `present` (rows, n) to the first store of a chain, and what leaves it to those that follow."""
        name, *others = chain
        store = self.stores[name]
        if others:
            leaving = np.maximum(store.tokens + present.sum(axis=1) - store.capacity, 0)
            old = np.minimum(leaving, store.tokens)
            if old.any():
                oldest = held(store, old, key)
                self._put(others, oldest.keys, oldest.values, None, oldest.tags, oldest.positions >= 0)
            at_once = present & (present.cumsum(axis=1) <= (leaving - old)[:, None])
            if at_once.any():
                self._put(others, key, value, angles, stood, at_once)
        if name == "far":
            if angles is None and self.rotary is not None:
                angles = self.rotary.angles(torch.from_numpy(stood).clamp(min=0).to(key.device), key)
            key = self._turned(key, angles, 0)
        store.write(key, value, mask=present, tags=None if name == "far" else stood)

    def _seen(
        self,
        query: torch.Tensor,
        asked: torch.Tensor,
        angles: Angles | None,
        positions: torch.Tensor,
        nearest: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The queries for each store, at the distance from which its keys are seen."""
        seen = {name: query if name == "recent" else asked for name in self.stores}
        if self.rotary is None:
            return seen
        if nearest is not None:
            closer = self.rotary.angles(nearest, asked)
            kept = [name for name in ("recent", "near") if name in seen]
            seen |= {name: self.rotary.turn(seen[name], angles, closer) for name in kept}
        if self.constant or "far" in seen:
            turned = self._turned(asked, angles, self.distance)
            seen |= {name: turned for name in ("first", "far") if name in seen and (self.constant or name == "far")}
        if "first" in seen and not self.constant and int(positions.max()) > self.distance and self.capacities["far"]:
            most = self._began(asked) + self.distance
            least = torch.minimum(positions, most)  # the first tokens, as near as they are, or else at `distance`
            all_far = "far" in seen and bool((least == self.distance).all())
            seen["first"] = turned if all_far else self.rotary.turn(asked, angles, self.rotary.angles(least, asked))
        return seen

    def _weighed(self, reading: Reading, scale: float) -> Reading:
        """What was read from `far`, weighed by how many more than `trained` memories are there."""
        excess = np.minimum(np.log(np.maximum(self.stores["far"].tokens / self.trained, 1)) / 2, LOST)
        if not excess.any():
            return reading
        near, lse = reading.neighbours, reading.lse
        less = torch.from_numpy(np.repeat(excess, len(lse) // len(excess))).to(lse)[:, None, None]
        if near is not None:
            near = replace(near, scores=near.scores - (less / scale)[..., None].to(near.scores))
        return replace(reading, lse=lse - less, neighbours=near)

    def _began(self, like: torch.Tensor) -> torch.Tensor:
        """Where the first token of each row stands, (rows, 1): after the padding that came before it."""
        key = "began", like.device
        if key not in self._whole:
            first = self.stores["first"]
            tags = first.at(np.where(first.tokens > 0, 0, -1)[:, None]).tags
            began = np.zeros((first.rows, 1), np.int64) if tags is None else np.maximum(tags, 0)
            self._whole[key] = torch.from_numpy(began).to(like.device)
        return self._whole[key].repeat_interleave(like.shape[0] // len(self._whole[key]), dim=0)

    def _held(self, names: str, like: torch.Tensor) -> Whole:
        """What stores with these names hold, copied when first asked for."""
        key = names, like.dtype, like.device
        if key not in self._whole:
            stores = names.split()
            with torch.inference_mode(False):  # it may be read with gradients later
                told = [name == "recent" for name in stores]
                self._whole[key] = Whole.of([self.stores[name] for name in stores], told, like)
        return self._whole[key]

    def _turned(self, vectors: torch.Tensor, angles: Angles | None, position: int) -> torch.Tensor:
        """`vectors`, rotated by `angles`, as if they stood at `position`."""
        if self.rotary is None:
            return vectors
        new = self.rotary.angles(torch.full((1, 1), position, device=vectors.device), vectors)
        return self.rotary.turn(vectors, angles, new)


def alike(key: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one is the other, computed once more."""
    return key.shape == other.shape and bool((key - other).abs().max() <= SAME * other.abs().max())
