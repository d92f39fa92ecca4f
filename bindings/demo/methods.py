"""The ways of reading that the demo compares, all on the same tokens, all scored alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from ..transformers import Trace, attach, detach
from ..transformers.document import read_in_windows


@dataclass(frozen=True)
class Result:
    """How one method read the document.

    Attributes
    ----------
    name : str
    losses : float32 tensor (tokens,)
        -log p of every token in nats; NaN for the first.
    seconds : float
    nbytes : int
        What the method kept of the past at its end.
    trace : Trace or None
    processor : float
        Seconds of processor time, of all threads together.
    """

    name: str
    losses: torch.Tensor
    seconds: float
    nbytes: int
    trace: Trace | None = None
    processor: float = 0.0

    def perplexity(self, start: int) -> float:
        """exp of the mean loss of the tokens from `start` on."""
        return math.exp(float(self.losses[start:].double().mean()))


Advance = Callable[[int], Any]


def without_memory(model: Any, ids: torch.Tensor, window: int, advance: Advance) -> Result:
    """Every window by itself."""

    def forward(part: torch.Tensor, start: int) -> torch.Tensor:
        return model(input_ids=part, use_cache=False).logits

    return _timed("no memory", lambda: (read_in_windows(ids, window, forward, advance, True), 0))


def with_cache(
    model: Any,
    ids: torch.Tensor,
    window: int,
    advance: Advance,
    keep: int | None = None,
    sinks: int = 0,
    anew: bool = False,
) -> Result:
    """Attention to all previous tokens, or to the last `keep` before the window and the first `sinks`, in every layer.

    `keep` alone is the recurrence of Transformer-XL; `keep` with `sinks`, and every position counted `anew` in what is
    kept, that of StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.2), whose positions never grow.
    """
    cache = DynamicCache(config=model.config)
    rotaries = {}
    if anew:
        rotaries = {i: layer.rotary for i, layer in attach(model).layers.items()}
        detach(model)

    def forward(part: torch.Tensor, start: int) -> torch.Tensor:
        first = cache.get_seq_length() if anew else start
        positions = torch.arange(first, first + part.shape[1])[None]
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, position_ids=positions).logits
        left = first + part.shape[1] - keep - sinks if keep is not None else 0
        if left > 0:
            for i, layer in enumerate(cache.layers):
                newest, rotary = layer.keys[:, :, -keep:], rotaries.get(i)
                if rotary is not None:
                    stand = positions[:, -1:] - torch.arange(keep - 1, -1, -1)
                    newest = rotary.turn(newest, *(rotary.angles(where, newest) for where in (stand, stand - left)))
                layer.keys = torch.cat([layer.keys[:, :, :sinks], newest], dim=2)
                layer.values = torch.cat([layer.values[:, :, :sinks], layer.values[:, :, -keep:]], dim=2)
        return logits

    def read() -> tuple[torch.Tensor, int]:
        losses = read_in_windows(ids, window, forward, advance, True)
        return losses, sum(a.nbytes for layer in cache.layers for a in (layer.keys, layer.values))

    some = f"previous {keep} tokens" + (f" + first {sinks}" if sinks else "") + (", placed anew" if anew else "")
    return _timed("full attention" if keep is None else some, read)


def with_memory(
    model: Any, ids: torch.Tensor, window: int, advance: Advance, *, capacity: int, trace: bool = False, **settings: Any
) -> Result:
    """perdure: windows by themselves, and k memories retrieved for every query of every layer."""
    memory = attach(model, capacity=capacity, window=window, **settings)
    try:
        with memory.tracing() if trace else nullcontext() as record:
            name = f"perdure memory {capacity}"
            read = _timed(name, lambda: (memory.read_document(ids, advance, score=True), memory.nbytes))
    finally:
        detach(model)
    return replace(read, trace=record)


def _timed(name: str, read: Callable[[], tuple[torch.Tensor, int]]) -> Result:
    start, used = time.perf_counter(), time.process_time()
    losses, nbytes = read()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return Result(name, losses[0], seconds, nbytes, processor=used)
