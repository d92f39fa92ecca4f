"""The order of one forward pass of an attached model: what it is given takes its place, is read, and is written."""

from __future__ import annotations

import itertools
import sys
import threading
from array import array
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from ...backends.errors import ArgumentError, ShapeError
from .cache import BEGUN, WindowLayer, bound
from .layer import LayerMemory
from .seam import implementation
from .trace import Trace

STATES = itertools.count()  # of all memories there are: no two ever have the same, nor has one of them again


class ForwardPasses:
    """What the hooks of an attached model call; see `ModelMemory`."""

    def __init__(
        self,
        model: Any,
        layers: dict[int, LayerMemory],
        window: int,
        limit: int | None,
        settings: dict[str, Any],
    ):
        self.model, self.layers, self.window = model, layers, window
        self.settings, positions = settings, settings["positions"]
        self.restore: Any = None  # what detach needs
        self.trace: Trace | None = None
        self.staging, self.retrieving = False, True
        self.inside = 0  # the thread in which a forward pass is under way, if there is one
        self._entering = threading.Lock()
        self.recomputed = False  # its layers will be computed once more
        beside = settings["recent"] and limit is None  # what is recent keeps its distance, so positions go on
        self._shifting, self._bounded = bool(positions != "constant" or beside), positions == "clamped"
        self._limit, self._frozen = limit, False
        self.history: list[array[int]] = []  # ids of all that each row has read; -1 where it was given embeddings
        self.following: torch.Tensor | None = None  # (rows,), where the next token of each row stands
        self.positions: torch.Tensor | None = None  # (rows or 1, n), where the tokens at hand stand
        self.nearest: torch.Tensor | None = None  # as far from what was read as they may seem, if they stand further
        self._state = next(STATES)
        self._mask: torch.Tensor | None = None  # which of them are no padding, bool (rows, n)
        self._ids: torch.Tensor | None = None  # which tokens they are, (rows, n)
        self._cache: Any = None  # the cache they came with
        self._told: Trace | None = None  # the trace that was told of them
        self.deferred = False  # they have been read, and their backward pass is still to come

    @property
    def tokens(self) -> np.ndarray:
        """Tokens each row remembers, int64 (rows,); none before anything is written."""
        return self.layers[self.settings["layers"][0]].tokens

    def begin(self, given: dict[str, Any]) -> dict[str, Any]:
        """Called with what a forward pass is `given`; returns it with positions that continue the history.

        Raises
        ------
        ArgumentError, ShapeError
            It cannot be read with this memory; `end` is then called nevertheless.
        """
        ours, now = implementation(self.restore[0]), self.model.config._attn_implementation
        if now != ours:
            remedy = f"Call detach(model), then model.set_attn_implementation({now!r}), and attach again."
            raise ArgumentError("model", f"attention implementation {ours!r}, as attached", repr(now), remedy)
        with self._entering:
            thread, broken = threading.get_ident(), self.inside != 0
            if broken and self.inside != thread and self._calling(self.inside):
                remedy = "Hold a lock while you call the model, or give each thread a model with a memory of its own."
                raise ArgumentError("model", "one forward pass at a time", "another, in another thread", remedy)
            self.inside = thread
        if broken:  # an interrupted one, after which PyTorch calls nobody
            self._fail()
        self.settle()
        self._drop_staged()
        self._told = None
        cache, caching = given.get("past_key_values"), given.get("use_cache")
        if cache is None and caching:
            cache = given["past_key_values"] = DynamicCache(config=self.model.config)
        given["use_cache"] = caching = cache is not None if caching is None else caching
        self.staging = cache is None and not caching and not self._frozen
        if self.staging and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
            remedy = "Use model.gradient_checkpointing_enable(), or torch.utils.checkpoint inside memory.frozen()."
            received = "one that a backward pass computes again"
            raise ArgumentError("model", "a forward pass that is remembered once", received, remedy)
        checkpointing = self.model.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
        )
        if checkpointing and cache is not None:
            remedy = "Call model.eval() first, or pass use_cache=False."
            received = "one, and gradient checkpointing, which takes it from the layers"
            raise ArgumentError("past_key_values", "no cache while training", received, remedy)
        self.recomputed = checkpointing and torch.is_grad_enabled()
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        rows, n = tokens.shape[:2]
        self._check(rows, cache)
        config = self.model.config.get_text_config(decoder=True)
        weights = given.get("output_attentions", getattr(config, "output_attentions", False))
        if weights and (cache is not None or self.tokens.any()):
            remedy = "Record what is drawn from memory with memory.tracing(), or call detach(model) first."
            raise ArgumentError("output_attentions", "False while there are memories", "True", remedy)
        mask = present(given.get("attention_mask"), n)
        positions = given.get("position_ids")
        if positions is None:
            cached = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(cached, cached + n, device=tokens.device)[None]
        if self._shifting and self.following is not None:
            given["position_ids"] = positions = positions + self._shift(positions, mask, cache, rows)
        if self._limit is not None and n > self._limit:
            remedy = "Pass a shorter segment, or attach(window=...) for read_document."
            raise ArgumentError("input_ids", f"at most {self._limit} tokens at once, as positions", f"{n}", remedy)
        if self._limit is not None and int(positions.max()) >= self._limit:
            if not self._bounded:
                raise ArgumentError(
                    "positions",
                    f"a document within the {self._limit} positions this model has learned",
                    f"position {int(positions.max())}",
                    "Attach with positions='clamped', or clear the memory first.",
                )
            given["position_ids"] = positions = positions.clamp(max=self._limit - 1)
        if cache is not None:
            bound(cache, self.window, self.layers, self.model.config.get_text_config(decoder=True).num_hidden_layers)
        self.positions, self._mask, self._cache, self._ids = positions, mask, cache, given.get("input_ids")
        self.nearest = None
        if cache is not None and self._bounded and self._limit is None and self.following is not None:
            most = self._of_rows(self.following.clamp(min=self.settings["distance"]), rows) + self.window
            self.nearest = torch.minimum(positions, most) if bool((positions > most).any()) else None
        if self.trace is not None:
            full = given.get("attention_mask")  # of what the cache holds too
            held = 0 if cache is None else cache.get_seq_length()
            known = full is not None and held and full.shape[1] == held + n
            earlier = full[:, :held].sum(dim=1).tolist() if known else None
            self.trace.begin((rows, n), given.get("input_ids"), mask, self.history, cache, earlier)
            self._told = self.trace
        for layer in self._windows:
            layer.read = True
        return given

    def tail(self, index: int) -> LayerMemory | None:
        """What the cache at hand remembers in layer `index`."""
        layer = None if self._cache is None else self._cache.layers[index]
        return layer.tail if isinstance(layer, WindowLayer) else None

    def end(self, failed: bool = False) -> None:
        """Called after a forward pass: write the segment, unless its backward pass will read once more.

        Gradient checkpointing computes every layer again in the backward pass, against the memory as it was; the
        segment is then written when the next forward pass begins. Of a pass that has `failed` nothing is written.
        """
        if self.inside != threading.get_ident():
            return  # refused, as another thread's was under way
        try:
            if failed:
                self._fail()
                return
            for layer in self._windows:
                layer.settle(self.positions, self._mask)
                layer.read = False
            self.deferred = self.recomputed
            if not self.deferred:
                self._commit()
        finally:
            self.inside = 0

    def _calling(self, thread: int) -> bool:
        """Whether a thread is in a call of the model: after an interruption it may live on, and do something else."""
        modules, frame = set(self.model.modules()), sys._current_frames().get(thread)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in modules:
                return True
            frame = frame.f_back
        return False

    def _fail(self) -> None:
        """Nothing of the forward pass at hand is kept."""
        self._drop_staged()
        for layer in self._windows:
            layer.take_back()
        if self._told is not None:
            self._told.take_back()
            self._told = None

    def settle(self) -> None:
        """Write what has been read, if that was put off."""
        if self.deferred:
            self._commit()

    def replace(
        self, layers: dict[int, LayerMemory], history: list[array[int]], following: torch.Tensor | None
    ) -> None:
        """Remember what `layers` hold instead: tokens `history`, and `following`, where the next ones stand."""
        self._drop_staged()
        self._state = next(STATES)
        for i, layer in self.layers.items():
            layer.take_over(layers[i])
        self.history = history
        self.following = None if following is None else following.to(next(self.model.parameters()).device)

    def _commit(self) -> None:
        """Write what every layer has staged.

        Raises
        ------
        ArgumentError
            Some of the layers were not called.
        """
        self.deferred = False
        if not self.staging:  # kept only to tell one backward pass from another
            self._drop_staged()
            return
        staged = [i for i, layer in self.layers.items() if layer.staged is not None]
        if len(staged) < len(self.layers):
            self._drop_staged()
            remedy = "Set layerdrop to 0: what a layer has not read it cannot remember."
            raise ArgumentError("model", "a forward pass through every layer", f"one through layers {staged}", remedy)
        self._state = next(STATES)
        for layer in self.layers.values():
            layer.write(self._mask, self.positions)
        self._note()
        last = self.positions if self._mask is None else torch.where(self._mask, self.positions, -1)
        following = last.amax(dim=1).expand(len(self.tokens)) + 1
        self.following = following if self.following is None else torch.maximum(self.following, following)

    def _note(self) -> None:
        """Keep the ids of what has been written."""
        rows, n = len(self.tokens), self.positions.shape[1]
        ids = torch.full((rows, n), -1) if self._ids is None else self._ids.cpu()
        there = torch.ones(rows, n, dtype=torch.bool) if self._mask is None else self._mask.cpu()
        self.history = self.history or [array("q") for _ in range(rows)]
        for row, history in enumerate(self.history):
            history.extend(ids[row][there[row]].tolist())

    @property
    def _windows(self) -> list[WindowLayer]:
        """Layers of the cache at hand that let go of what leaves the window."""
        return [layer for layer in getattr(self._cache, "layers", ()) if isinstance(layer, WindowLayer)]

    def _drop_staged(self) -> None:
        for layer in self.layers.values():
            layer.staged = None

    def _shift(self, positions: torch.Tensor, mask: torch.Tensor | None, cache: Any, rows: int) -> torch.Tensor:
        """How far each row's positions move so that its first token follows what the row remembers; (rows, 1)."""
        kept = getattr(cache, BEGUN, None)
        if kept is not None and cache.get_seq_length():
            return kept[1]
        first = torch.zeros(rows, 1, dtype=torch.int64, device=positions.device)
        if mask is not None:
            first = mask.int().argmax(dim=1, keepdim=True)
        shift = self._of_rows(self.following, rows) - positions.expand(rows, -1).gather(1, first)
        if self._bounded and self._limit is not None:  # learned positions: never past the last
            shift = shift.clamp(max=self._limit - 1 - int(positions.max()))
        if cache is not None:
            setattr(cache, BEGUN, (self._state, shift))
        return shift

    def _of_rows(self, each: torch.Tensor, rows: int) -> torch.Tensor:
        """A number of each row remembered, as (rows, 1) for as many `rows` as continue them."""
        return each.repeat_interleave(rows // len(each))[:, None]

    def _check(self, rows: int, cache: Any) -> None:
        held = len(self.tokens)
        if held and (rows % held or (self.staging and rows != held)):
            expected = f"{held} rows, as the memory has" if self.staging else f"a multiple of the memory's {held} rows"
            remedy = "Give every row its own document, or clear() the memory first."
            raise ShapeError("input_ids", expected, f"{rows}", remedy)
        if any(getattr(layer, "is_compileable", False) for layer in getattr(cache, "layers", ())):
            raise ArgumentError(
                "past_key_values", "a dynamic cache", "a static one", "Leave out cache_implementation='static'."
            )
        if cache is None or not self._shifting:
            return
        known = getattr(cache, BEGUN, None)
        if not cache.get_seq_length():
            setattr(cache, BEGUN, (self._state, 0))
        elif known[0] != self._state if known else self.following is not None:
            remedy = "Begin another cache after reading or clearing; read inside memory.frozen() while one is in use."
            expected = "a cache that began with what is remembered now"
            raise ArgumentError("past_key_values", expected, "one that began with something else", remedy)


def present(mask: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """Which of the newest n tokens are no padding, bool (rows, n); None where all are.

    Raises
    ------
    ShapeError
    """
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ShapeError(
            "attention_mask",
            "shape (rows, tokens), 0 for padding",
            str(tuple(mask.shape)),
            "Memory has to know which tokens are padding: pass the two-dimensional mask.",
        )
    mask = mask[:, -n:].bool()
    return None if bool(mask.all()) else mask
