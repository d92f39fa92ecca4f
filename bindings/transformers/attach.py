"""attach and detach: a decoder with memory, and the same decoder without."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...backends.devices import Place, place_of
from ...backends.errors import ArgumentError
from ...core import checks
from ...memory.device_row import check
from ...memory.knn import INDEXES
from .layer import LayerMemory
from .memory import ATTACHED, ModelMemory
from .positions import computed_in, find_rotary
from .seam import BASES, GATE, SCALE, hook, implementation

MEMORIES: weakref.WeakSet[ModelMemory] = weakref.WeakSet()  # those of all attached models
SINKS = 4
ATTENDING = {"attention", "full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers, as configured
BOTH_WAYS = (("is_causal", False), ("use_bidirectional_attention", True))  # what configurations say of it
OTHERS = re.compile("Mamba|SSM|Recurrent|LinearAttention|Lightning|DeltaNet|ShortConv|Rwkv|RetNet")  # carry a state
MIXINGS, POSITIONS = ("joint", "gate"), ("true", "clamped", "constant")


def attach(
    model: Any,
    *,
    tokenizer: Any = None,
    layers: str | int | Sequence[int] = "all",
    k: int = 32,
    capacity: int = 65_536,
    mixing: str = "joint",
    positions: str = "clamped",
    distance: int | None = None,
    window: int = 512,
    recent: int | None = None,
    sinks: int = SINKS,
    index: str = "auto",
    target_recall: float = 0.8,
    device: Any = None,
    device_capacity: int | None = None,
) -> ModelMemory:
    """Give a Hugging Face decoder a long-term memory; its weights stay as they are.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder with the "sdpa" or "eager" attention of transformers: GPT-2, Llama, Qwen, Mistral and the like.
    tokenizer : optional
        Lets `read_document` take text.
    layers : "all", int or sequence of int
        Which layers remember; negative numbers count from the last. The others read what is `recent` and the `sinks`.
    k : int
        Memories that each query of each head attends to.
    capacity : int
        The most tokens each row of each layer remembers; the oldest leave first.
    mixing : {"joint", "gate"}
        "joint": one softmax over the text at hand and the memories. "gate": a softmax each, mixed by a learned number
        a head (parameter `perdure_gate` of each attached attention layer, 0 at first: half and half), where another
        (`perdure_scale`, 1 at first) scales the scores of memories.
    positions : {"true", "clamped", "constant"}
        The distance at which memories are seen. "true": the distance they have, so documents should stay within the
        context the model was trained on. "clamped": the distance they have for the newest `distance` memories, and
        `distance` for all older ones, of which k more are retrieved. "constant": `distance` for all. Where n
        are seen at `distance` and the rest of the model's context has room for m, fewer, they weigh sqrt(m / n) each,
        but at least 1/e.
    distance : int, optional
        By default half of the model's context for "clamped", `window` for "constant".
    window : int
        Tokens that `read_document` gives the model at once.
    recent : int, optional
        Of what a document left before the text at hand, the newest that every query reads, all of them, at the distance
        they have; part of `capacity`. By default `window`. What stands close by matters to every head at once, and `k`
        of it are too few.
    sinks : int
        How many of a document's first tokens are kept for good, beside `capacity`, and read by every query. Models park
        the attention they have no use for on them, and read badly once they are gone (Xiao et al., arXiv 2309.17453).
    index : {"auto", "exact", "ivf", "hnsw"}
        How memories are found; see `KNNMemory`. "auto" searches a layer's few thousand memories exactly, and more of
        them as costs least on this machine: what is read may then differ a little from machine to machine.
    target_recall : float
        Share of the true neighbours that approximate indexes are to find. What they miss has not been worth its time:
        with 0.8 documents read no worse than with all of them.
    device : str or torch.device, optional
        Where memories are held and searched, exactly: main memory by default, whatever the model's device. What is
        saved from one device loads on every other.
    device_capacity : int, optional
        The most tokens of a row of a layer on the `device`; older ones are kept in main memory.

    Returns
    -------
    ModelMemory

    Raises
    ------
    ArgumentError
        A model that memory cannot be attached to, or an argument out of range; the model is as it was.
    BackendError
        No such device.

    Notes
    -----
    With nothing remembered the model computes exactly what it computed before. Memory costs, each layer, O(q n d) time
    for q queries over n remembered tokens, and heads x n x 2d numbers. Source: Memorizing Transformers (arXiv
    2203.08913), section 3. Differs from the paper in that "joint" mixing, which needs no training, is the default.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError("model", "a PreTrainedModel of transformers", type(model).__name__, "Load one first.")
    modules = set(model.modules())
    holder = next((held.model for held in MEMORIES if not modules.isdisjoint(held.attentions.values())), None)
    if holder is not None:
        remedy = (
            "Call detach(model) first." if holder is model else f"Call detach on the {type(holder).__name__} first."
        )
        raise ArgumentError("model", "a model without memory", "one that has memory", remedy)
    base = model.config._attn_implementation
    base = base.removeprefix(implementation(""))  # set for another model that was built from the same configuration
    if base not in BASES:
        remedy = "Call model.set_attn_implementation('sdpa') first."
        raise ArgumentError("model", f"attention implementation {' or '.join(BASES)}", repr(base), remedy)
    attentions = find_attentions(model)
    chosen = choose(layers, sorted(attentions))
    capacity = checks.count("capacity", capacity)
    checks.choice("index", index, INDEXES)
    if checks.positive("target_recall", target_recall) > 1:
        raise ArgumentError("target_recall", "at most 1", repr(target_recall), "Pass target_recall=0.95.")
    checks.neighbours(k, capacity)
    window = checks.count("window", window)
    recent = window if recent is None else checks.count("recent", recent, least=0)
    sinks = checks.count("sinks", sinks, least=0)
    checks.choice("mixing", mixing, MIXINGS)
    checks.choice("positions", positions, POSITIONS)
    if device is not None:
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ArgumentError("device", "a device of PyTorch", repr(device), "Pass device='cuda'.") from error
        place = place_of(device)
        if isinstance(place, Place):
            check(place, index, "float32")
    if device_capacity is not None:
        checks.count("device_capacity", device_capacity)
        if device is None:
            remedy = "Pass device='cuda' too, or leave device_capacity out."
            raise ArgumentError("device_capacity", "None without a device", repr(device_capacity), remedy)
    config = model.config.get_text_config(decoder=True)
    checks.addressable(capacity=capacity, layers=len(chosen), heads=config.num_attention_heads, bytes=8)
    context = config.max_position_embeddings
    if distance is None:
        distance = max(context // 2, 1) if positions == "clamped" else window
    distance = checks.count("distance", distance)
    beside = sorted(attentions) if recent else chosen
    body = find_body(model, attentions)
    wearing = [attentions[i] for i in beside]
    try:
        model.set_attn_implementation(implementation(base))
        if model.config._attn_implementation != implementation(base):
            remedy = "Attach memory to a model that calls its attention through transformers.AttentionInterface."
            raise ArgumentError("model", "attention that can be replaced", type(model).__name__, remedy)
        rotaries = {i: find_rotary(body, attentions[i]) for i in beside}
        learned = not any(rotaries.values())
        near = {"true": capacity, "clamped": capacity if learned else min(distance, capacity), "constant": 0}[positions]
        remembering: dict[str, Any] = {"near": near, "far": capacity - near}
        reading: dict[str, Any] = {"near": recent, "far": 0}
        common: dict[str, Any] = {
            "distance": distance,
            "trained": max(context - distance, distance),
            "sinks": sinks,
            "recent": recent,
            "k": k,
            "settings": {
                "index": index,
                "target_recall": target_recall,
                "device": device,
                "device_capacity": device_capacity,
            },
        }
        memory = ModelMemory(
            model,
            tokenizer,
            {i: LayerMemory(i, rotaries[i], **(remembering if i in chosen else reading), **common) for i in beside},
            {i: attentions[i] for i in beside},
            window=window,
            limit=context if learned else None,
            settings={
                "layers": chosen,
                "capacity": capacity,
                "mixing": mixing,
                "positions": positions,
                "distance": distance,
                "recent": recent,
                "sinks": sinks,
                "index": index,
            },
        )
        if mixing == "gate":
            for i in chosen:
                like = computed_in(model, attentions[i])
                for name, number in ((GATE, 0.0), (SCALE, 1.0)):
                    start = torch.full((config.num_attention_heads,), number, dtype=like.dtype, device=like.device)
                    attentions[i].register_parameter(name, nn.Parameter(start))
        memory.restore = (base, wearing, hook(body, attentions, memory))
        setattr(model, ATTACHED, memory)
    except BaseException:
        take_off(model, base, wearing, [])
        raise
    MEMORIES.add(memory)
    return memory


def detach(model: Any) -> None:
    """Take the memory of `model` off again: it is what it was before `attach`.

    Raises
    ------
    ArgumentError
        No memory is attached.
    """
    memory = getattr(model, ATTACHED, None)
    if memory is None:
        raise ArgumentError("model", "a model with memory", "one without", "Call attach(model) first.")
    MEMORIES.discard(memory)
    delattr(model, ATTACHED)
    take_off(model, *memory.restore)


def take_off(model: Any, base: str, attentions: Iterable[nn.Module], handles: Iterable[Any]) -> None:
    """Remove what `attach` adds to a model; a configuration stays while others with memory were built from it too."""
    for handle in handles:
        handle.remove()
    for attention in attentions:
        for name in (GATE, SCALE):
            attention._parameters.pop(name, None)
    if model.config._attn_implementation == implementation(base) and not any(
        memory.model.config is model.config for memory in MEMORIES
    ):
        model.set_attn_implementation(base)


def find_attentions(model: nn.Module) -> dict[int, nn.Module]:
    """The model's causal self-attention layers by number.

    Raises
    ------
    ArgumentError
        There are none, or not all layers are, or they do what memory cannot join yet.
    """
    every = [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__
        and getattr(module, "layer_idx", None) is not None
        and getattr(module, "is_causal", False)
    ]
    found = {module.layer_idx: module for module in every}
    config = model.config.get_text_config(decoder=True)
    both_ways = any(getattr(config, name, None) is value for name, value in BOTH_WAYS)
    if not found or model.config.is_encoder_decoder or both_ways:
        remedy = "Attach memory to a decoder such as GPT-2, Llama, Qwen or Mistral."
        raise ArgumentError("model", "a decoder with causal self-attention", type(model).__name__, remedy)
    total = getattr(config, "num_hidden_layers", len(found))
    others = {type(module).__name__ for module in model.modules() if OTHERS.search(type(module).__name__)}
    others |= set(getattr(config, "layer_types", None) or ()) - ATTENDING
    others |= {"a state" for module in model.modules() if getattr(module, "_is_stateful", False)}
    if len(every) != len(found) or len(found) < total or others:
        received = f"{len(every)} in {total} layers" + (f", and {', '.join(sorted(others))}" if others else "")
        remedy = "Attach memory to a model whose only memory of earlier tokens is attention, once a layer."
        raise ArgumentError("model", "one causal self-attention in every layer", received, remedy)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        remedy = "Set config.attn_logit_softcapping to None, or use another model."
        raise ArgumentError("model", "attention without a soft cap on its scores", type(model).__name__, remedy)
    return found


def find_body(model: nn.Module, attentions: dict[int, nn.Module]) -> nn.Module:
    """The innermost model that holds all attention layers: the one that is called whoever is called."""
    wanted = set(attentions.values())
    bodies = [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted <= set(m.modules())]
    return bodies[-1]


def choose(layers: str | int | Sequence[int], known: list[int]) -> list[int]:
    """`layers` as numbers, in order.

    Raises
    ------
    ArgumentError
    """
    if isinstance(layers, str):
        checks.choice("layers", layers, ("all",))
        return known
    wanted: Any = [layers] if hasattr(layers, "__index__") else layers
    wanted = list(wanted) if isinstance(wanted, Iterable) else [None]
    total = known[-1] + 1
    whole = [hasattr(n, "__index__") and not isinstance(n, bool) for n in wanted]
    numbers = sorted(
        {n.__index__() + total * (n < 0) if w else None for n, w in zip(wanted, whole, strict=True)}, key=str
    )
    if not numbers or any(n not in known for n in numbers):
        expected = f"'all', or layers from 0 to {known[-1]}"
        raise ArgumentError("layers", expected, repr(layers), "Name layers that the model has.")
    return sorted(numbers)
