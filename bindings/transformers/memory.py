"""What an attached model remembers: one memory a layer, and the order of reading and writing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ...backends.errors import ArgumentError, ShapeError
from ...core import checks
from .cache import BEGUN, WindowLayer, bound
from .document import Progress, read_in_windows, token_ids
from .explain import Explanation
from .layer import LayerMemory
from .saved import Keeping
from .trace import Trace

STATES = itertools.count()  # of all memories there are: no two ever have the same, nor has one of them again


class ModelMemory(Keeping):
    """The memory of a model, as `attach` returns it.

    A segment is what one forward pass is given without a key-value cache. It is read against what was written before,
    and written when the whole model has read it. With a cache (`use_cache=True`, `generate`) the newest `window` tokens
    stay there, and what leaves it is remembered by the cache: the memory here is only read meanwhile.

    Attributes
    ----------
    layers : dict of int to LayerMemory
    window : int
        Tokens `read_document` gives the model at once, and tokens that a cache keeps.
    settings : dict
        What `attach` was called with, as far as it says what is stored.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layers: dict[int, LayerMemory],
        attentions: dict[int, Any],
        *,
        window: int,
        limit: int | None,
        settings: dict[str, Any],
    ):
        self.model, self.tokenizer, self.window = model, tokenizer, window
        self.layers, self.attentions = layers, attentions
        self.settings, positions = settings, settings["positions"]
        self.trace: Trace | None = None
        self.last_trace: Trace | None = None
        self.restore: Any = None  # what detach needs
        self.staging, self.retrieving = False, True
        self.inside = self.recomputed = False  # a forward pass is under way; its layers will be computed once more
        beside = settings["recent"] and limit is None  # what is recent keeps its distance, so positions go on
        self._shifting, self._bounded = bool(positions != "constant" or beside), positions == "clamped"
        self._limit, self._frozen = limit, False
        self.history: list[list[int]] = []  # ids of all that each row has read; -1 where it was given embeddings
        self.following: torch.Tensor | None = None  # (rows,), where the next token of each row stands
        self.positions: torch.Tensor | None = None  # (rows or 1, n), where the tokens at hand stand
        self.nearest: torch.Tensor | None = None  # as far from what was read as they may seem, if they stand further
        self._state = next(STATES)
        self._mask: torch.Tensor | None = None  # which of them are no padding, bool (rows, n)
        self._ids: torch.Tensor | None = None  # which tokens they are, (rows, n)
        self._cache: Any = None  # the cache they came with
        self.deferred = False  # they have been read, and their backward pass is still to come

    @property
    def tokens(self) -> np.ndarray:
        """Tokens each row remembers, int64 (rows,); none before anything is written."""
        return self.layers[self.settings["layers"][0]].tokens

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values in all layers."""
        return sum(store.nbytes for layer in self.layers.values() for store in layer.stores.values())

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything, or everything of some `rows`, whose history then starts anew.

        Raises
        ------
        ArgumentError
            A row out of range; then nothing has been forgotten.
        """
        if rows is not None:
            self.settle()
        self._drop_staged()
        self._state = next(STATES)
        if rows is None:
            self.following, self.history = None, []
        for layer in self.layers.values():
            layer.clear(rows)
        if rows is not None and self.following is not None:
            self.following = self.following.clone()
            self.following[list(rows)] = 0
            for row in rows:
                self.history[row] = []

    def read_document(
        self, text_or_ids: Any, progress: Progress = True, score: bool = False, retrieve: bool = True
    ) -> Any:
        """Read a document of any length, window by window, remembering all that `capacity` allows.

        Parameters
        ----------
        text_or_ids : str, or integers (n,) or (rows, n)
            Text needs the tokenizer given to `attach`. Where nothing was read before, it begins with the token that
            the tokenizer begins texts with, if there is one, as Llama's and Gemma's have; ids are read as they are.
        progress : bool or callable
            Show a progress bar on the terminal; or a function to call with the number of tokens of each window.
        score : bool
            Also score every token by what came before it.
        retrieve : bool
            False reads the document with no more than what is recent and the first tokens at hand, and remembers it all
            the same: many times faster, and no slower the longer it is. What is asked afterwards retrieves.

        Returns
        -------
        int or float32 tensor (rows, n)
            Tokens read, or with `score` the loss of every token in nats: -log p(token | window and memory); NaN for
            the first, which nothing predicts. Inside `frozen` every window is scored, and nothing is remembered.

        Raises
        ------
        ArgumentError, ShapeError
            Text without a tokenizer, ids that are not integers of at most two axes or that the model does not know,
            `score` for a model without a language-model head, or nothing to do, as memory is frozen.
        """
        if self._frozen and not score:
            remedy = "Read outside of frozen(), or pass score=True."
            raise ArgumentError("read_document", "memory that may be written", "a frozen one", remedy)
        ids = token_ids(text_or_ids, self.tokenizer, opening=not any(self.history))
        known = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            received = f"ids from {int(ids.min())} to {int(ids.max())}"
            raise ArgumentError(
                "text_or_ids", f"ids from 0 to {known - 1}", received, "Pass ids of this model's tokenizer."
            )
        ids = ids.to(next(self.model.parameters()).device)
        heads = self.model.get_output_embeddings() is not None
        if score and not heads:
            remedy = "Attach memory to the model with its language-model head."
            raise ArgumentError("score", "a model that predicts tokens", type(self.model).__name__, remedy)
        keep = {} if score or not heads else {"logits_to_keep": 1}

        def forward(part: torch.Tensor, start: int) -> torch.Tensor:
            return self.model(input_ids=part, use_cache=False, **keep)[0]

        before, self.retrieving = self.retrieving, retrieve
        try:
            losses = read_in_windows(ids, self.window, forward, progress, score)
        finally:
            self.retrieving = before
        return losses if score else ids.shape[1]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Read without writing, inside the `with` block: many questions can then be asked about the same memory."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    @contextlib.contextmanager
    def tracing(self, keep: int = 1) -> Iterator[Trace]:
        """Record what every token draws from, the `keep` nearest memories of a head, inside the `with` block.

        Tokens are those that the model is given, but for drafts that assisted decoding rejects. In beam search, rows
        are beams as they stand at each step, which `explain` refuses to call a text.
        """
        before, made = self.trace, Trace(keep)
        self.trace = made
        try:
            yield made
        finally:
            made.end()
            self.last_trace, self.trace = made, before

    def explain(self, token: int | None = None, row: int = 0, most: int = 5) -> Explanation:
        """What predicting a token drew on, by the trace at hand or the last one; print it, or write it as a page.

        Parameters
        ----------
        token : int, optional
            Number of the token among those traced; all of them by default. The token before it predicted it. The
            number of traced tokens is that of the next one, which the last predicted and the model was not given.
        row : int
            Of what was traced, such as the first of several questions about one document.
        most : int
            Memories named for a token.

        Raises
        ------
        ArgumentError
            No tokenizer is attached, nothing was traced, not that token or row, or a beam search.
        """
        trace = self.trace or self.last_trace
        if self.tokenizer is None or trace is None or not trace.tokens:
            expected, received = "a tokenizer and a trace", "no tokenizer" if self.tokenizer is None else "no trace"
            remedy = "Pass attach(model, tokenizer=...), and call the model inside memory.tracing()."
            raise ArgumentError("explain", expected, received, remedy)
        if trace.reordered:
            remedy = "Search outside of memory.tracing(), then call the model with the answer inside it."
            raise ArgumentError("explain", "rows that are each one text", "beams, which change places", remedy)
        if checks.count("row", row, least=0) >= trace.rows:
            raise ArgumentError("row", f"a number below {trace.rows}", repr(row), "Name a row that was traced.")
        every = range(1, trace.tokens + 1)
        chosen = every if token is None else [checks.count("token", token, most=trace.tokens)]
        document, drawn = trace.told(row)
        draws = {t: drawn(t - 1)[: checks.count("most", most)] for t in chosen}
        return Explanation(document, trace.ids(row), draws, self.tokenizer)

    def begin(self, given: dict[str, Any]) -> dict[str, Any]:
        """Called with what a forward pass is `given`; returns it with positions that continue the history."""
        self.settle()
        self._drop_staged()
        self.inside = True
        cache, caching = given.get("past_key_values"), given.get("use_cache")
        if cache is None and caching:
            cache = given["past_key_values"] = DynamicCache(config=self.model.config)
        given["use_cache"] = caching = cache is not None if caching is None else caching
        self.staging = cache is None and not caching and not self._frozen
        again = torch.is_grad_enabled() and self.model.training and cache is None
        self.recomputed = again and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
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
        return given

    def tail(self, index: int) -> LayerMemory | None:
        """What the cache at hand remembers in layer `index`."""
        layer = None if self._cache is None else self._cache.layers[index]
        return layer.tail if isinstance(layer, WindowLayer) else None

    def end(self) -> None:
        """Called after a forward pass: write the segment, unless its backward pass will read once more.

        Gradient checkpointing computes every layer again in the backward pass, against the memory as it was; the
        segment is then written when the next forward pass begins.
        """
        for layer in getattr(self._cache, "layers", ()):
            if isinstance(layer, WindowLayer):
                layer.settle(self.positions, self._mask)
        self.inside, self.deferred = False, self.recomputed
        if not self.deferred:
            self._commit()

    def settle(self) -> None:
        """Write what has been read, if that was put off."""
        if self.deferred:
            self._commit()

    def replace(self, layers: dict[int, LayerMemory], history: list[list[int]], following: torch.Tensor | None) -> None:
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
        self.history = self.history or [[] for _ in range(rows)]
        for row, history in enumerate(self.history):
            history += ids[row][there[row]].tolist()

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refused: the copy of a model would still write to this memory."""
        raise ArgumentError("model", "one without memory to copy", "one with memory", "Call detach(model) first.")


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
