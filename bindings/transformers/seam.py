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

from ...backends.errors import ArgumentError
from ...core.attention import Reading, gate, merge
from .layer import LayerMemory
from .mixing import read_locally
from .positions import Angles

if TYPE_CHECKING:
    from .forward import ForwardPasses

BASES = ("sdpa", "eager")  # attention implementations that memory can join; their masks are understood in read_locally
UNKNOWN = ("softcap", "position_bias", "sinks", "bias", "indices", "block_indices")  # what some models' attention takes
GATE, SCALE = "perdure_gate", "perdure_scale"  # the parameters that gated mixing adds to an attention layer


@dataclass(frozen=True)
class Seam:
    """What a hook hands to one call of the attention function."""

    memory: ForwardPasses
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
    perdure_caught: list[torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own attention, joined by what memory holds; (rows, q, query_heads, dim), and no weights.

    With `perdure_caught` nothing is computed: the key is put there.
    """
    if perdure_caught is not None:
        perdure_caught.append(key)
        return query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[3]), None
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
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        remedy = "Attach memory to a model whose attention is a softmax of scaled scores."
        raise ArgumentError("model", f"attention without {unknown[0]}", type(module).__name__, remedy)
    if seam.staging:
        layer.stage(key, value, seam.angles, not seam.memory.inside)
    memories = [memory for memory in (layer, seam.tail) if memory is not None and not memory.empty]
    if not memories:
        output, weights = own()
        if torch.is_grad_enabled() and hasattr(
            module, GATE
        ):  # where only these learn, a first segment has a gradient too
            output = output + 0 * (getattr(module, GATE) + getattr(module, SCALE)).sum().to(output.dtype)
        return output, weights
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    at_hand = read_locally(query, key, value, attention_mask, scale)
    if kwargs.get("s_aux") is not None:  # a score of each head that takes its part of the softmax, and gives nothing
        idle = kwargs["s_aux"].to(at_hand.lse.dtype)[:, None].expand_as(at_hand.lse)
        at_hand = merge(at_hand, Reading(torch.zeros_like(at_hand.output), idle))
    if dropout:  # the text at hand loses weights to dropout, after the softmax, as in the model's own attention
        at_hand = type(at_hand)(own()[0].transpose(1, 2), at_hand.lse)
    return join(module, seam, memories, query, at_hand, scale).transpose(1, 2).contiguous(), None


@torch.compiler.disable  # memory is NumPy, and changes from call to call
def join(
    module: nn.Module,
    seam: Seam,
    memories: list[LayerMemory],
    query: torch.Tensor,
    at_hand: Reading,
    scale: float,
) -> torch.Tensor:
    """What a layer with something remembered gives, (rows, query_heads, q, dim): both readings in one."""
    bias, factor = getattr(module, GATE, None), getattr(module, SCALE, None)
    keep = 0 if seam.memory.trace is None else seam.memory.trace.keep
    beside: list[Reading] = []  # what is read whole, as the text at hand is
    found: list[Reading] = []
    for memory in memories:
        before = 0 if memory is seam.layer or seam.layer.empty else seam.layer.written  # a cache follows what was read
        asked = query if factor is None else query * factor.abs().to(query.dtype)[:, None, None]
        wanted = keep if seam.memory.retrieving else None
        nearest = seam.memory.nearest if memory is seam.layer else None
        readings = memory.read(query, asked, seam.angles, seam.memory.positions, scale, before, wanted, nearest)
        for name, reading in readings.items():
            (found if name in ("near", "far") else beside).append(reading)
    trace = seam.memory.trace
    if bias is None or not found:
        joined = merge(at_hand, *beside, *found)
        if trace is not None:
            trace.record(seam.layer.index, [*beside, *found], joined.lse, scale)
        return joined.output
    local, remembered = merge(at_hand, *beside), merge(*found)
    if trace is not None:
        trace.record(seam.layer.index, found, remembered.lse, scale, torch.sigmoid(bias.detach().float()))
    return gate(remembered, local.output, bias.to(local.output.dtype))


def base_function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that transformers would have called."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


for _base in BASES:
    AttentionInterface.register(implementation(_base), functools.partial(attention, _base))
    AttentionMaskInterface.register(implementation(_base), ALL_MASK_ATTENTION_FUNCTIONS[_base])


def hook(model: nn.Module, attentions: dict[int, nn.Module], memory: ForwardPasses) -> list[Any]:
    """Install the hooks that feed `attention`; returns their handles.

    The order of one forward pass: the model's pre-hook begins a segment, each attached layer reads and stages, and the
    model's hook writes what was staged. An exception in between leaves memory as it was.
    """
    begins = functools.partial(begin, memory, inspect.signature(model.forward))
    handles = [
        model.register_forward_pre_hook(begins, with_kwargs=True),
        model.register_forward_hook(functools.partial(end, memory), with_kwargs=True, always_call=True),
    ]
    for index, layer in memory.layers.items():
        before = functools.partial(hand_over, memory, layer)
        handles.append(attentions[index].register_forward_pre_hook(before, with_kwargs=True))
    return handles


@torch.compiler.disable
def begin(
    memory: ForwardPasses,
    signature: inspect.Signature,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[()], dict[str, Any]]:
    """Before the model reads."""
    given = signature.bind_partial(*args, **kwargs).arguments
    given.update(given.pop("kwargs", {}))
    return (), memory.begin(given)


@torch.compiler.disable
def end(memory: ForwardPasses, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """After the model has read; without an output where it, or `begin`, raised."""
    memory.end(failed=output is None)


def hand_over(
    memory: ForwardPasses, layer: LayerMemory, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a layer attends."""
    tail = memory.tail(layer.index)
    seam = Seam(memory, layer, tail, kwargs.get("position_embeddings"), memory.staging or memory.recomputed)
    return args, {**kwargs, "perdure_seam": seam}
