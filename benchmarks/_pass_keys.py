"""Pass keys hidden in long texts: who still knows them at the end."""

from __future__ import annotations

import copy
import functools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from perdure.bindings.pretrained import Pretrained
from perdure.bindings.transformers import attach, detach
from transformers import DynamicCache

WINDOW = 512
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "\nThe pass key is {}. Remember it. {} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
CUE = 2  # digits of a key that a question after one of several gives
CUED = "\nWhat is the pass key that begins with {0}? The pass key is {0}"


def hidden(tokenizer: Any, length: int, depth: float, seed: int) -> tuple[torch.Tensor, str]:
    """About `length` tokens of filler, with a random pass key at `depth` of them; and that key."""
    key = str(random.Random(f"{seed} {length} {depth}").randrange(10_000, 100_000))
    filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
    needle = tokenizer(NEEDLE.format(key, key), add_special_tokens=False)["input_ids"]
    sentences = (length - len(needle)) // len(filler)
    before = round(depth * sentences)
    return torch.tensor([filler * before + needle + filler * (sentences - before)]), key


def many_hidden(tokenizer: Any, length: int, many: int, seed: int) -> tuple[torch.Tensor, list[tuple[str, range]]]:
    """About `length` tokens of filler with `many` keys hidden evenly in it, no two of which begin alike; and the keys,
    each with the tokens that tell it."""
    rng = random.Random(f"{seed} {many}")
    keys = [str(1000 * start + rng.randrange(1000)) for start in rng.sample(range(10, 100), many)]
    filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
    needles = [tokenizer(NEEDLE.format(key, key), add_special_tokens=False)["input_ids"] for key in keys]
    sentences = (length - sum(map(len, needles))) // len(filler)
    ids: list[int] = []
    places = []
    for i, needle in enumerate(needles):
        between = round((i + 0.5) / many * sentences) - round((i - 0.5) / many * sentences) * (i > 0)
        ids += filler * between + needle
        places.append(range(len(ids) - len(needle), len(ids)))
    ids += filler * (sentences - round((many - 0.5) / many * sentences))
    return torch.tensor([ids]), list(zip(keys, places, strict=True))


def alone(memory: Any, keys: list[tuple[str, range]]) -> Iterator[str]:
    """Each of `keys` in turn, while of the others nothing is remembered: in their places `memory` has the keys and
    values of the tokens before them once more. Afterwards it is what it was."""
    if not keys:
        return
    of_keys = np.array([place for _, places in keys for place in places])
    of_text = np.array([place - len(places) for _, places in keys for place in places])
    stores = [(i, name) for i, layer in memory.layers.items() for name in layer.stores if name != "first"]
    own: dict[tuple[int, str], list[np.ndarray]] = {}
    for key, places in [*keys, ("", range(max(places[-1] for _, places in keys) + 1))]:
        for where in stores:
            layer, store = memory.layers[where[0]], memory.layers[where[0]].stores[where[1]]
            there, instead = of_keys - layer.capacities["first"], of_text - layer.capacities["first"]
            held = (instead >= store.written[0] - store.tokens[0]) & (there < store.written[0])
            if held.any():
                state = store.state_dict()
                arrays = [a for name, a in state.items() if name.endswith((".keys", ".values", ".labels"))]
                there, instead = there[held] % store.capacity, instead[held] % store.capacity
                mine = np.isin(of_keys[held], places)
                originals = own.setdefault(where, [a[:, there].copy() for a in arrays])
                for array, original in zip(arrays, originals, strict=True):
                    wide = mine[:, None] if array.ndim == 3 else mine
                    array[:, there] = np.where(wide, original, array[:, instead])
                layer.stores[where[1]] = type(store).from_state_dict(state)
                layer.take_over(layer)  # what it keeps of its stores is not theirs any more
        if key:
            yield key


def cued(key: str) -> tuple[str, str]:
    """The question for one key of several, and the rest of that key."""
    return CUED.format(key[:CUE]), key[CUE:]


def knows(tokenizer: Any, question: str, answer: str, forward: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether every token of the answer is the likeliest next one: what greedy generation would write."""
    question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
    logits = forward(torch.tensor([question + answer]))
    return logits[0, len(question) - 1 : -1].argmax(-1).tolist() == answer


@torch.inference_mode()
def pass_keys(pretrained: Pretrained, setting: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Every length, depth and seed, by perdure, by the previous window, and by full attention.

    Texts of one length begin alike, with filler up to their keys: that is read once, and copied for each of them, which
    gives what reading each text alone gives, bit for bit, as copies are made between windows. "perdure seconds" are
    those of a text's filler and of what is its own.
    """
    model, tokenizer = pretrained.model, pretrained.tokenizer
    for length in setting["lengths"]:
        texts = {depth: hidden(tokenizer, length, depth, setting["seed"]) for depth in sorted(setting["depths"])}
        filler, _ = hidden(tokenizer, length, 1.0, setting["seed"])
        memory, done, filling = attach(model, capacity=length, index=setting["index"], **setting["further"]), 0, 0.0
        try:
            for depth, (ids, key) in texts.items():
                row: dict[str, Any] = {"length": ids.shape[1], "depth": depth}
                both = min(ids.shape[1], filler.shape[1])
                alike = int((ids[:, :both] != filler[:, :both])[0].int().argmax()) if depth < 1 else 0
                branch, start = alike // WINDOW * WINDOW, time.perf_counter()
                if branch > done:
                    memory.read_document(ids[:, done:branch], progress=False, retrieve=setting["retrieve"])
                filling, done, last = filling + time.perf_counter() - start, branch, depth == max(texts)
                kept, start = None if last else copied(memory), time.perf_counter()
                memory.read_document(ids[:, branch:], progress=False, retrieve=setting["retrieve"])
                with memory.frozen():
                    row["perdure"] = knows(tokenizer, QUESTION, f" {key}", lambda q: model(q, use_cache=False).logits)
                row["perdure seconds"] = round(filling + time.perf_counter() - start, 1)
                row["GiB"] = round(memory.nbytes / 2**30, 2)
                if kept:
                    memory.replace(*kept)
                keep(row)
        finally:
            detach(model)
        for depth, (ids, key) in texts.items():
            row = {"length": ids.shape[1], "depth": depth}
            for name, part in (("previous window", ids[:, -WINDOW:]), ("full attention", ids)):
                if part.shape[1] + 2 * len(QUESTION) <= setting["full to"]:
                    row[name] = knows(tokenizer, QUESTION, f" {key}", functools.partial(_after, model, part))
            if len(row) > 2:
                keep(row)


def copied(memory: Any) -> tuple[Any, ...]:
    """What `memory` remembers now, as its `replace` takes it."""
    layers = {i: copy.copy(layer) for i, layer in memory.layers.items()}
    for layer in layers.values():
        layer.select(range(len(memory.tokens)))
    return layers, [history[:] for history in memory.history], memory.following


@torch.inference_mode()
def many_pass_keys(pretrained: Pretrained, setting: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """One reading of the longest length; after each length, every key read by then is asked for."""
    if setting["index"] != "exact":
        raise SystemExit("other keys are overwritten where they are stored, which only exact search follows")
    model, tokenizer, seconds, done = pretrained.model, pretrained.tokenizer, 0.0, 0
    ids, keys = many_hidden(tokenizer, max(setting["lengths"]), setting["keys"], setting["seed"])
    memory = attach(model, capacity=ids.shape[1], index=setting["index"], **setting["further"])

    def forward(question: torch.Tensor) -> torch.Tensor:
        with memory.frozen():
            return model(question, use_cache=False).logits

    try:
        for length in sorted(setting["lengths"]):
            start = time.perf_counter()
            memory.read_document(ids[:, done:length], progress=False, retrieve=setting["retrieve"])
            seconds, done = seconds + time.perf_counter() - start, length
            asked = [(key, places) for key, places in keys if places[-1] < length]
            row = {"length": min(length, ids.shape[1]), "keys": len(asked), "seconds to read": round(seconds, 1)}
            row["GiB"] = round(memory.nbytes / 2**30, 2)
            start = time.perf_counter()
            row["by its start"] = sum(knows(tokenizer, *cued(key), forward) for key, _ in asked)
            row["seconds a question"] = round((time.perf_counter() - start) / max(len(asked), 1), 2)
            keep(row)
            for key in alone(memory, asked):
                depth = round(dict(asked)[key][-1] / row["length"], 3)
                keep({"length": row["length"], "depth": depth, "alone": knows(tokenizer, QUESTION, f" {key}", forward)})
    finally:
        detach(model)
    for length in setting["lengths"]:
        asked = [key for key, places in keys if places[-1] < length]
        for name, first in (("previous window", max(length - WINDOW, 0)), ("full attention", 0)):
            if length - first + 2 * len(CUED) <= setting["full to"]:
                cache = DynamicCache(config=model.config)
                for start in range(first, length, WINDOW):
                    model(ids[:, start : min(start + WINDOW, length)], past_key_values=cache, logits_to_keep=1)
                hits = sum(knows(tokenizer, *cued(key), functools.partial(_continued, model, cache)) for key in asked)
                keep({"length": length, "keys": len(asked), f"{name}, by its start": hits})


def _after(model: Any, part: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
    """Logits of a question right after `part`."""
    ids = torch.cat([part, question], dim=1)
    return model(ids, use_cache=False, logits_to_keep=question.shape[1]).logits


def _continued(model: Any, cache: Any, question: torch.Tensor) -> torch.Tensor:
    """Logits of a question after what is cached, which stays as it is."""
    logits = model(question, past_key_values=cache, use_cache=True).logits
    cache.crop(-question.shape[1])
    return logits
