"""Where memory enters a model: an attention function registered with transformers, and hooks that feed it.

The registered function computes what the model's own would, unless a hook on that attention layer handed it a `Seam`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...core.attention import gate, merge
from .layer import LayerMemory
from .mixing import read_locally
from .positions import Angles

if TYPE_CHECKING:
    from .memory import ModelMemory

BASES = ("sdpa", "eager")  # attention implementations that memory can join; their masks are understood in read_locally
GATE = "perdure_gate"  # the parameter that gated mixing adds to an attention layer


@dataclass(frozen=True)
class Seam:
    """What a hook hands to one call of the attention function."""

    memory: ModelMemory
    layer: LayerMemory
    tail: LayerMemory | None  # what the cache at hand remembers
    angles: Angles | None
    staging: bool


def implementation(base: str) -> str:
    """Name under which the attention function that grows out of `base` is registered."""
    return f"perdure_{base}"


def attention(
    base: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    perdure_seam: Seam | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own attention, joined by what memory holds; (rows, q, query_heads, dim), and no weights."""
    own = functools.partial(
        base_function(base, module),
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        **kwargs,
    )
    if perdure_seam is None:
        return own()
    seam, layer = perdure_seam, perdure_seam.layer
    if seam.staging:
        layer.stage(key, value, seam.angles)
    memories = [memory for memory in (layer, seam.tail) if memory is not None and not memory.empty]
    if not memories:
        return own()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    readings = []
    for memory in memories:
        before = 0 if memory is layer or layer.empty else layer.written  # what a cache remembers follows what was read
        readings += memory.read(query, seam.angles, seam.memory.positions, scale, before)
    remembered = merge(*readings)
    bias = getattr(module, GATE, None)
    if bias is not None:
        local = own()[0].transpose(1, 2)
        output, joint = gate(remembered, local, bias.to(local.dtype)), remembered.lse
    else:
        at_hand = read_locally(query, key, value, attention_mask, scale)
        if dropout:  # the text at hand loses weights to dropout, after the softmax, as in the model's own attention
            at_hand = type(at_hand)(own()[0].transpose(1, 2), at_hand.lse)
        joined = merge(at_hand, remembered)
        output, joint = joined.output, joined.lse
    if seam.memory.trace is not None:
        seam.memory.trace.record(layer.index, readings, joint, scale)
    return output.transpose(1, 2).contiguous(), None


def base_function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that transformers would have called."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


for _base in BASES:
    AttentionInterface.register(implementation(_base), functools.partial(attention, _base))
    AttentionMaskInterface.register(implementation(_base), ALL_MASK_ATTENTION_FUNCTIONS[_base])


def hook(model: nn.Module, attentions: dict[int, nn.Module], memory: ModelMemory) -> list[Any]:
    """Install the hooks that feed `attention`; returns their handles.

    The order of one forward pass: the model's pre-hook begins a segment, each attached layer reads and stages, and the
    model's hook writes what was staged. An exception in between leaves memory as it was.
    """
    signature = inspect.signature(model.forward)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = signature.bind_partial(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        return (), memory.begin(given)

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        memory.end()

    def hand_over(layer: LayerMemory) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            tail = memory.tail(layer.index)
            seam = Seam(memory, layer, tail, kwargs.get("position_embeddings"), memory.staging)
            return args, {**kwargs, "perdure_seam": seam}

        return before

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, with_kwargs=True),
    ]
    for index, layer in memory.layers.items():
        handles.append(attentions[index].register_forward_pre_hook(hand_over(layer), with_kwargs=True))
    return handles
