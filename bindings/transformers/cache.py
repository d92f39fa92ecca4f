"""A key-value cache that stays as small as the window: what leaves it is remembered, in a memory that travels with it.

`generate` reorders, repeats, crops and resets its cache (beam search, assisted decoding); what this cache remembers
follows. Memory that was filled before is only read meanwhile, by every row that continues it, so several questions can
be asked about one document, and all beams share it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...backends.errors import ArgumentError
from .layer import LayerMemory

PLAIN = {DynamicLayer, DynamicSlidingWindowLayer}
BEGUN = "perdure_begun"  # attribute of a cache: the memory's state when it began, and how far its positions are moved
SLACK = 8  # an eighth of the window more may gather before the oldest leave, so that they leave in company


class WindowLayer(DynamicLayer):
    """One layer's newest tokens, and the memory of those that were cached before them.

    Parameters
    ----------
    window : int
        Tokens that stay when older ones leave.
    tail : LayerMemory or None
        What remembers those that leave; without one they are lost, as in a sliding window.
    sliding : int, optional
        In a layer that itself attends only to so many tokens, its own included: `window` is then at most one less, and
        what leaves does so at once, as it would be seen neither here nor there meanwhile.
    """

    keys: Any
    values: Any

    def __init__(self, window: int, tail: LayerMemory | None, sliding: int | None = None):
        super().__init__()
        self.is_sliding = sliding is not None  # which of the model's masks this layer is given
        self.window, self.tail = window if sliding is None else min(window, sliding - 1), tail
        self.slack = self.window // SLACK if sliding is None else 0
        self.cumulative_length = 0  # tokens ever cached and not cropped
        self.reordered = False  # whether rows have changed places
        self.read = False  # whether a model with memory reads it just now
        self.notes: torch.Tensor | None = None  # (rows, cached, 2): where each token stands, and whether it is present

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append a segment (rows, heads, n, dim); gives all that is cached.

        Raises
        ------
        ArgumentError
            The model has no memory any more, or is another: nobody would look at what has left.
        """
        if not self.read:
            remedy = "Begin another cache, or attach memory before a cache begins and leave it on."
            expected = "a cache that began with the model as it is"
            raise ArgumentError("past_key_values", expected, "one that began with memory attached", remedy)
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def settle(self, positions: torch.Tensor, mask: torch.Tensor | None) -> None:
        """After a forward pass of tokens at `positions` (rows or 1, n), padding where `mask` is False: let go of the
        oldest."""
        rows, n = self.keys.shape[0], positions.shape[1]
        positions = positions.expand(rows, n)
        mask = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
        notes = torch.stack([positions, mask.to(positions.dtype)], dim=-1)
        self.notes = notes if self.notes is None else torch.cat([self.notes, notes], dim=1)
        leaving = self.keys.shape[-2] - self.window
        if leaving <= self.slack:
            return
        if self.tail is not None:
            stood, there = self.notes[:, :leaving].unbind(dim=-1)
            keys = self.keys[:, :, :leaving]
            angles = None if self.tail.rotary is None else self.tail.rotary.angles(stood, keys)
            self.tail.stage(keys, self.values[:, :, :leaving], angles)
            self.tail.write(there.bool(), stood)
        self.keys, self.values = self.keys[:, :, leaving:].clone(), self.values[:, :, leaving:].clone()
        self.notes = self.notes[:, leaving:].clone()

    def take_back(self) -> None:
        """Let go of what came with a forward pass that failed: it has no notes yet."""
        self.read = False
        if self.notes is None:
            self.reset()
        elif (tokens := self.keys.shape[-2] - self.notes.shape[1]) > 0:
            self.keys, self.values = self.keys[:, :, :-tokens], self.values[:, :, :-tokens]
            self.cumulative_length -= tokens

    def get_seq_length(self) -> int:
        """Tokens cached, those that have left included: where the next one stands."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length of the keys that the next call attends to, and the number of those that have left.

        Transformers before 5.3 give the positions of the queries in place of their number.
        """
        query_length = query_length if isinstance(query_length, int) else len(query_length)
        cached = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return cached + query_length, self.cumulative_length - cached

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back: a negative number of them, or down to a positive total.

        Raises
        ------
        ArgumentError
            Some of them have left for memory, which gives nothing back.
        """
        removed = self.cumulative_length - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if removed <= 0 or not self.is_initialized:
            return
        if removed > self.keys.shape[-2]:
            held, remedy = self.keys.shape[-2], "Attach with a larger window, or draft fewer tokens at once."
            raise ArgumentError("tokens_to_remove", f"at most the {held} tokens in the cache", f"{removed}", remedy)
        self.keys, self.values = self.keys[:, :, :-removed], self.values[:, :, :-removed]
        self.notes = self.notes[:, :-removed]
        self.cumulative_length -= removed

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.notes = None
        self.is_initialized, self.cumulative_length = False, 0
        if self.tail is not None:
            self.tail.clear(None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.reordered |= beam_idx.tolist() != list(range(len(beam_idx)))
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` rows."""
        if self.is_initialized:
            self._select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these rows stay."""
        self._select(indices)

    def _select(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.notes = None if self.notes is None else self.notes.index_select(0, rows.to(self.notes.device))
        if self.tail is not None:
            self.tail.select(rows.tolist())


def bound(cache: Any, window: int, layers: dict[int, LayerMemory], total: int) -> None:
    """Make an empty cache of plain and sliding layers one of `WindowLayer`; any other stays what it is.

    Parameters
    ----------
    cache : Cache
    window : int
    layers : dict of int to LayerMemory
        Those that remember, as the cache begins.
    total : int
        Layers of the model.
    """
    plain = isinstance(cache, DynamicCache) and {type(layer) for layer in cache.layers} <= PLAIN
    if plain and not cache.offloading and cache.get_seq_length() == 0:
        slides = [getattr(layer, "sliding_window", None) for layer in cache.layers] or [None] * total
        tails = [layers[i].successor() if i in layers else None for i in range(len(slides))]
        cache.layers[:] = [WindowLayer(window, *pair) for pair in zip(tails, slides, strict=True)]
