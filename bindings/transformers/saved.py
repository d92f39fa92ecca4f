"""What an attached model keeps on disk: its memory, sealed in one file, and beside it the few numbers it learned."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...backends.arrays import optional_import
from ...backends.errors import ArgumentError, FileError
from ...memory.disk import as_path, opened, replacing
from ...memory.file import load_arrays, save_arrays
from ...memory.state import pack, unpack
from .layer import LayerMemory
from .seam import GATE, SCALE

if TYPE_CHECKING:
    from .memory import ModelMemory

Path = str | os.PathLike[str]
KIND, ADAPTER = "ModelMemory", "perdure adapter 1"
PROBE = "The naïve café, 1984:\n\tdef  f(x): return x**2 # ∑∞ 記憶"
SAMPLED, CLOSE = 16, 0.02  # numbers of a weight matrix that tell a model from another, in half precision too
ROUNDED = 0.006, 1e-4  # of a number itself, and of the largest beside it: what half precision may do to a weight
TELLING = re.compile("multiplier|scal|eps$|_act$|activation|alibi")  # settings


def save_memory(memory: ModelMemory, path: Path) -> None:
    """Save what `memory` remembers; see `ModelMemory.save`."""
    arrays = {}
    for i, layer in memory.layers.items():
        arrays[f"layers.{i}.rotation"] = rotation(layer)[:, 0]
        for name, store in layer.stores.items():
            arrays |= {f"layers.{i}.{name}.{part}": array for part, array in store.state_dict().items()}
    arrays["weights"] = np.concatenate(samples(memory.model))
    for row, history in enumerate(memory.history):
        arrays[f"history.{row}"] = np.array(history, np.int64)
    if memory.following is not None:
        arrays["following"] = memory.following.cpu().numpy()
    config = {**memory.settings, "tokenizer": fingerprint(memory.tokenizer), "attention": attention_of(memory.model)}
    save_arrays(pack(KIND, config, arrays), path)


def load_memory(memory: ModelMemory, path: Path) -> None:
    """Replace what `memory` remembers by what was saved; see `ModelMemory.load`."""
    path = as_path(path)
    state = load_arrays(path)
    try:
        config, arrays = unpack(KIND, state)
    except ArgumentError as error:
        remedy = "Load a single memory with perdure.load."
        raise FileError(str(path), "the memory of a model", error.received, remedy) from error
    agree(memory, config, arrays)
    loaded = {}
    try:
        for i, layer in memory.layers.items():
            loaded[i] = LayerMemory(i, layer.rotary, **layer.sizes, sinks=layer.sinks, settings=layer.settings)
            loaded[i].restore({n: a for n, a in within(arrays, f"layers.{i}.").items() if n != "rotation"})
        rows = len(next(iter(loaded.values())).tokens)
        history = [array("q", arrays[f"history.{row}"].tolist()) for row in range(rows)]
        following = torch.from_numpy(arrays["following"]) if rows else None
        if any(len(layer.tokens) != rows for layer in loaded.values()) or (rows and following.shape != (rows,)):
            raise ArgumentError("rows", f"{rows} in every layer", "others", "Save it again.")
    except (ArgumentError, KeyError) as error:
        raise FileError(str(path), "the memory of a model", f"one altered ({error})", "Save it again.") from error
    memory.replace(loaded, history, following)


def agree(memory: ModelMemory, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Refuse what was saved with another tokenizer, by another model, or with other settings.

    Raises
    ------
    ArgumentError
    """
    ours, theirs = fingerprint(memory.tokenizer), config.get("tokenizer")
    if ours is not None and theirs is not None and ours != theirs:
        expected = f"the tokenizer that the memory was read with, fingerprint {theirs[:12]}"
        raise ArgumentError("tokenizer", expected, f"one with fingerprint {ours[:12]}", "Attach with that tokenizer.")
    for name, value in memory.settings.items():
        saved = config.get(name)
        if saved != value:
            remedy = f"Call attach(model, {name}={saved!r}, ...) to load it."
            raise ArgumentError(name, f"{saved!r}, as the memory was saved with", repr(value), remedy)
    remedy = "Keys and values mean nothing to another model: load that model, or read the document again."
    expected, other = "the model that the memory was read with", None
    told, kept = attention_of(memory.model), config.get("attention") or {}
    unlike = [name for name in told if name in kept and kept[name] != told[name]]
    if unlike or not kept:
        other = f"one of other settings ({', '.join(unlike)})"
    for i, layer in memory.layers.items():
        if not close(arrays.get(f"layers.{i}.rotation"), list(rotation(layer))):
            other = f"one whose layer {i} turns keys otherwise"
    if not close(arrays.get("weights"), samples(memory.model), *ROUNDED):
        other = "one of other weights"
    if other is not None:
        raise ArgumentError("model", expected, other, remedy)


def attention_of(model: Any) -> dict[str, Any]:
    """What a configuration says of how its layers compute, beside weights and rotation, as JSON gives it back."""
    config = model.config.get_text_config(decoder=True).to_dict()
    told = {name: value for name, value in config.items() if TELLING.search(name) and name != "rope_scaling"}
    told |= {name: config.get(name) for name in ("model_type", "layer_types", "sliding_window")}
    return json.loads(json.dumps(told, default=str))


def rotation(layer: LayerMemory) -> np.ndarray:
    """Frequencies that a layer turns keys by, and the factors that come with it, float32 (n, 1)."""
    if layer.rotary is None:
        return np.zeros((1, 1), np.float32)
    cos, sin = (a.flatten().float().numpy() for a in layer.rotary.angles(torch.ones(1, 1, dtype=int), torch.zeros(1)))
    return np.concatenate([np.arctan2(sin, cos), np.hypot(sin, cos)])[:, None]


def close(kept: np.ndarray | None, own: list[np.ndarray], itself: float = 0.0, largest: float = CLOSE) -> bool:
    """Whether `kept`, one after another, are the same but for `itself` of each number and `largest` of the largest."""
    ends = np.cumsum([len(part) for part in own])
    if kept is None or kept.shape != (ends[-1],):
        return False
    parts = zip(np.split(kept, ends[:-1]), own, strict=True)
    return all(
        (np.abs(theirs - ours) <= itself * np.abs(ours) + largest * np.abs(ours).max(initial=0)).all()
        for theirs, ours in parts
    )


def fingerprint(tokenizer: Any) -> str | None:
    """A digest of what makes a tokenizer give the ids it gives: its vocabulary, and how it splits a text."""
    if tokenizer is None:
        return None
    words = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    told = [words, list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def samples(model: nn.Module) -> list[np.ndarray]:
    """A few numbers of each of a model's weights, float32, but for what memory learns."""
    named = sorted(model.named_parameters())
    weights = [p.detach().flatten() for n, p in named if n.rpartition(".")[2] not in (GATE, SCALE) and not p.is_meta]
    return [w[:: len(w) // SAMPLED | 1].float().cpu().numpy() for w in weights]  # odd: not from one column alone


def within(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix`, named by what follows it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def learned_numbers(memory: ModelMemory) -> dict[str, nn.Parameter]:
    """Gate and scale of every layer that has them, by name.

    Raises
    ------
    ArgumentError
        "joint" mixing learns nothing, or the memory was detached.
    """
    if memory.settings["mixing"] != "gate":
        remedy = "Call attach(model, mixing='gate'), whose gates and scales are learned."
        raise ArgumentError("mixing", "'gate'", repr(memory.settings["mixing"]), remedy)
    memory.attached()
    parts = {"gate": GATE, "scale": SCALE}
    layers = {i: memory.attentions[i] for i in memory.settings["layers"]}
    return {f"layers.{i}.{part}": getattr(m, name) for i, m in layers.items() for part, name in parts.items()}


def save_learned(memory: ModelMemory, path: Path) -> None:
    """Save gates and scales; see `ModelMemory.save_adapter`."""
    path, numbers = as_path(path), learned_numbers(memory)
    library = optional_import("safetensors.torch", extra="transformers")
    with replacing(path) as new:
        library.save_file(
            {n: p.detach().cpu().contiguous() for n, p in numbers.items()}, new, metadata={"format": ADAPTER}
        )


def load_learned(memory: ModelMemory, path: Path) -> None:
    """Replace gates and scales by saved ones; see `ModelMemory.load_adapter`."""
    path, numbers = as_path(path), learned_numbers(memory)
    library = optional_import("safetensors", extra="transformers")
    with opened(path):
        pass  # no link, pipe or folder
    try:
        with library.safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get("format") == ADAPTER
            kept = {name: file.get_tensor(name) for name in (file.keys() if known else ())}
    except (library.SafetensorError, OSError) as error:
        raise FileError(str(path), "an adapter", str(error)[:200], "Name a file of save_adapter.") from error
    if not known:
        raise FileError(str(path), "an adapter", "a file that is none", "Name a file of save_adapter.")
    if {n: tuple(t.shape) for n, t in kept.items()} != {n: tuple(p.shape) for n, p in numbers.items()}:
        layers = sorted({int(name.split(".")[1]) for name in kept})
        remedy = f"Call attach(model, layers={layers}, mixing='gate') on a model with as many heads."
        raise ArgumentError("layers", f"{layers}, as the adapter has", str(memory.settings["layers"]), remedy)
    if not all(bool(tensor.isfinite().all()) for tensor in kept.values()):
        raise FileError(str(path), "finite gates and scales", "NaN or infinity", "Train them again.")
    with torch.no_grad():
        for name, parameter in numbers.items():
            parameter.copy_(kept[name])


class Keeping:
    """Gives a model's memory its `save` and `load`, and those of what it learned."""

    def save(self: Any, path: Path) -> None:
        """Save everything remembered, in every layer, to one checksummed file; `load` gives it back.

        Parameters
        ----------
        path : path
            Replaced whole, where a file is there already.

        Raises
        ------
        FileError
            It cannot be written; what was there before is still there.

        Notes
        -----
        The file also holds the ids of what was read, a fingerprint of the tokenizer and a few of the model's weights,
        so that it is not taken for the memory of another model. Cost: a copy of the memory, and one SHA-256 over it.
        """
        self.settle()
        save_memory(self, path)

    def load(self: Any, path: Path) -> None:
        """Remember what was saved to `path`, in place of what is remembered now.

        Raises
        ------
        FileError
            No such file, or a damaged one.
        ArgumentError
            Saved with another tokenizer, by another model, or attached with other settings. In every case what is
            remembered now stays.
        """
        self.settle()
        load_memory(self, path)

    def save_adapter(self: Any, path: Path) -> None:
        """Save what gated mixing has learned, gates and scales, as a small safetensors file at `path`.

        Raises
        ------
        ArgumentError
            `mixing` is not "gate".
        FileError
            It cannot be written; what was there before is still there.
        """
        save_learned(self, path)

    def load_adapter(self: Any, path: Path) -> None:
        """Take over gates and scales that `save_adapter` saved at `path`.

        Raises
        ------
        ArgumentError
            `mixing` is not "gate", or the adapter is of other layers.
        FileError
            No adapter. In every case the gates and scales stay as they are.
        """
        load_learned(self, path)

    def parameters(self: Any) -> list[nn.Parameter]:
        """Gates and scales, for an optimizer: all that fine-tuning needs to learn while the model itself is frozen.

        Raises
        ------
        ArgumentError
            `mixing` is not "gate".
        """
        return list(learned_numbers(self).values())
