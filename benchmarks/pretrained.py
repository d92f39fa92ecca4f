"""What memory does for a real pretrained model, SmolLM2-135M with a context of 8192 tokens, without any training.

    nox -s bench -- pretrained                                   # quick: two cores, six minutes
    nox -s bench -- pretrained --full --document=topology.ml     # hours

1. perplexity: one long document in windows of 512 tokens, within the context and beyond it, against windows alone, the
   previous window, the same with the document's first tokens, the same with positions counted anew (StreamingLLM), and
   full attention as far as it goes.
2. passkey: a number hidden in a long text and asked for at its end, by length and depth. With --keys=N, N of them in
   one text, asked for after each of --lengths of one reading: one by one, the memories of the others overwritten,
   and by its first two digits, with all of them there.
3. definitions: the loss at uses of identifiers whose last mention is so far back that only memory reaches it, and how
   often what was retrieved there is one of those mentions. It takes its losses from the runs of 1.

The document is a file of Python's standard library unless --document names one. What was found: results/pretrained.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import platform
import random
import re
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from perdure.bindings.demo.methods import Result, with_cache, with_memory, without_memory
from perdure.bindings.pretrained import Pretrained, smollm2
from perdure.bindings.transformers import attach, detach
from perdure.bindings.transformers.document import token_ids
from transformers import DynamicCache

RESULTS = Path(__file__).parent / "results"
WINDOW, SINKS, FAR, DEFAULT = 512, 4, 1024, "_pydecimal.py"
POSITIONS = ("clamped", "true", "constant")
QUICK: dict[str, Any] = {
    "tokens": 10_240, "k": [32], "memory": ["all"], "positions": POSITIONS[:1], "lengths": [4096], "depths": [0.1, 0.6],
}  # fmt: skip
FULL: dict[str, Any] = {
    "tokens": 32_768, "k": [8, 32, 128], "memory": [2048, 8192, "all"], "positions": POSITIONS,
    "lengths": [4096, 8192, 16_384, 32_768, 65_536, 131_072], "depths": [0.1, 0.3, 0.5, 0.7, 0.9],
}  # fmt: skip
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "\nThe pass key is {}. Remember it. {} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
CUE = 2  # digits of a key that a question after one of several gives
CUED = "\nWhat is the pass key that begins with {0}? The pass key is {0}"


# ---- 1. perplexity --------------------------------------------------------------------------------------------------


def read_every_way(model: Any, ids: torch.Tensor, setting: dict[str, Any], keep: Callable[[Result], None]) -> None:
    """Every baseline, and perdure with every k, size and position policy; `keep` takes each result as it comes."""
    n, context = ids.shape[1], model.config.max_position_embeddings
    if "none" in setting["baselines"]:
        keep(without_memory(model, ids, WINDOW, _silent))
    if "xl" in setting["baselines"]:
        keep(with_cache(model, ids, WINDOW, _silent, keep=WINDOW))
    if "sinks" in setting["baselines"]:
        keep(with_cache(model, ids, WINDOW, _silent, keep=WINDOW, sinks=SINKS))
    if "streaming" in setting["baselines"]:
        keep(with_cache(model, ids, WINDOW, _silent, keep=WINDOW, sinks=SINKS, anew=True))
    if "full" in setting["baselines"]:
        keep(with_cache(model, ids[:, :context], WINDOW, _silent))
    for k in setting["k"]:
        for size in setting["memory"]:
            for positions in setting["positions"]:
                settings = {"k": k, "positions": positions, "index": setting["index"], **setting["further"]}
                capacity = n if size == "all" else size
                trace = setting["trace"] and k == 32 and size == "all" and positions == setting["positions"][0]
                read = with_memory(model, ids, WINDOW, _silent, capacity=capacity, trace=trace, **settings)
                name = f"perdure k={k}, memory {size}, {positions}" + "".join(
                    f", {option} {value}" for option, value in setting["further"].items()
                )
                keep(dataclasses.replace(read, name=name))


def _silent(tokens: int) -> None:
    pass


def scores(result: Result, context: int) -> dict[str, Any]:
    """Perplexity after the first window: within the model's context, from there to its double, beyond it, and in the
    last quarter; and what it took."""

    def perplexity(start: int, end: int) -> float | None:
        part = result.losses[start:end].double()
        return round(math.exp(float(part.mean())), 4) if len(part) else None

    n = len(result.losses)
    return {
        "way": result.name,
        "tokens": n,
        "within": perplexity(WINDOW, context),
        "to twice": perplexity(context, 2 * context) if n >= 2 * context else None,
        "beyond": perplexity(context, n),
        "last quarter": perplexity(3 * n // 4, n),
        "ms a token": round(1000 * result.seconds / n, 2),
        "of processor": round(1000 * result.processor / n, 2),
        "MiB": round(result.nbytes / 2**20, 1),
    }


# ---- 2. pass key ----------------------------------------------------------------------------------------------------


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
                alike = int((ids != filler)[0].int().argmax()) if depth < 1 else 0
                branch, start = alike // WINDOW * WINDOW, time.perf_counter()
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
    return layers, [list(history) for history in memory.history], memory.following


@torch.inference_mode()
def many_pass_keys(pretrained: Pretrained, setting: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """One reading of the longest length; after each length, every key read by then is asked for."""
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


# ---- 3. definitions -------------------------------------------------------------------------------------------------


def far_uses(text: str, tokenizer: Any, n: int) -> list[tuple[range, list[int]]]:
    """Tokens of every use of an identifier defined in `text` whose mentions all end FAR tokens or more before it, and
    the tokens of those mentions."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in encoded["offset_mapping"][:n]]
    starts = [start for start, _ in encoded["offset_mapping"][:n]]
    defined = set(re.findall(r"^\s*(?:def|class|let|and)\s+(\w{4,})", text, re.M)) | set(
        re.findall(r"^\s*(\w{4,})\s*=[^=]", text, re.M)
    )
    first_token = functools.partial(_token_at, ends)
    mentions: dict[str, list[range]] = {}
    for found in re.finditer(r"\w+", text[: ends[-1]]):
        if found[0] in defined:
            last = first_token(found.end() - 1)
            tokens = range(first_token(found.start()), last + 1)
            if starts[tokens[0]] >= found.start() - 1:  # else it is part of a longer token
                mentions.setdefault(found[0], []).append(tokens)
    uses = []
    for places in mentions.values():
        for i, use in enumerate(places[1:], 1):
            if use[0] - places[i - 1][-1] >= FAR:
                uses.append((use, [t for place in places[:i] for t in place]))
    return uses


def _token_at(ends: list[int], character: int) -> int:
    """The token that holds a character."""
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ends[middle] > character else (middle + 1, high)
    return low


def at_uses(result: Result, uses: list[tuple[range, list[int]]]) -> dict[str, Any]:
    """Mean loss of a whole identifier at those uses, and where it was traced, the share of them for one of whose tokens
    the memory that stood out most is, or stands right before, an earlier mention; and what chance would give."""
    inside = [(use, told) for use, told in uses if use[-1] < len(result.losses)]
    row: dict[str, Any] = {
        "way": result.name,
        "uses": len(inside),
        "loss": round(sum(float(result.losses[list(use)].sum()) for use, _ in inside) / max(len(inside), 1), 3),
    }
    if result.trace is not None:
        usual, hits, chance = result.trace.usual(), 0, 0.0
        for use, told in inside:
            near = {t + shift for t in told for shift in (-1, 0)}
            drawn = [result.trace.draws(token - 1) for token in use]
            outstanding = [max(d, key=lambda draw: draw.weight - usual[draw.layer, draw.head]) for d in drawn if d]
            hits += any(draw.position in near for draw in outstanding)
            chance += 1 - (1 - len(near) / use[0]) ** len(use)
        row |= {"retrieved a mention": round(hits / max(len(inside), 1), 3)}
        row |= {"by chance": round(chance / max(len(inside), 1), 4)}
    return row


# ---- all of it ------------------------------------------------------------------------------------------------------


def plot(kept: dict[str, Any], losses: dict[str, torch.Tensor], path: Path) -> None:
    """Perplexity along the document."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        every = range(WINDOW, len(values), WINDOW)
        curve = [math.exp(float(values[max(i - WINDOW, WINDOW) : i + WINDOW].double().mean())) for i in every]
        axes.plot([i + WINDOW // 2 for i in every], curve, label=name)
    axes.axvline(kept["context"], color="grey", linestyle=":", label="end of the model's context")
    axes.set(xlabel="tokens read", ylabel=f"perplexity of {2 * WINDOW} tokens", yscale="log", title=kept["document"])
    axes.set_ylim(top=40)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--experiments", default="perplexity,passkey,definitions")
    parser.add_argument("--document", type=Path, default=Path(sysconfig.get_path("stdlib")) / DEFAULT)
    parser.add_argument("--baselines", default="none,xl,sinks,full", help="... and streaming")
    parser.add_argument("--tokens", type=int)
    for name, kind in (("k", int), ("memory", str), ("positions", str), ("lengths", int), ("depths", float)):
        parser.add_argument(f"--{name}", type=lambda text, kind=kind: [kind(part) for part in text.split(",") if part])
    parser.add_argument("--index", default="exact")
    parser.add_argument("--further", type=json.loads, default={}, help='more of attach, as JSON: {"recent": 0}')
    parser.add_argument("--keys", type=int, default=0, help="pass keys in one text; 0: a text for each")
    parser.add_argument("--no-retrieval", dest="retrieve", action="store_false", help="while pass keys are read")
    parser.add_argument("--no-trace", dest="trace", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "pretrained.json")
    options = parser.parse_args()
    setting = dict(FULL if options.full else QUICK) | {"full to": 8192}
    given = {n: v for n, v in vars(options).items() if n not in ("full", "document", "output", "experiments")}
    setting |= {name: value for name, value in given.items() if value is not None}
    setting["memory"] = [size if size == "all" else int(size) for size in setting["memory"]]
    chosen = options.experiments.split(",")

    pretrained = smollm2()
    context = pretrained.model.config.max_position_embeddings
    text = options.document.read_text(encoding="utf-8", errors="replace")
    ids = token_ids(text[: 8 * setting["tokens"]], pretrained.tokenizer)[:, : setting["tokens"]]
    kept: dict[str, Any] = {
        "command": command(sys.argv[1:]),
        "model": pretrained.name,
        "context": context,
        "document": options.document.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "setting": {name: value for name, value in setting.items() if not callable(value)},
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, Python {platform.python_version()}",
    }
    losses: dict[str, torch.Tensor] = {}
    uses = (
        far_uses(text[: 8 * setting["tokens"]], pretrained.tokenizer, ids.shape[1]) if "definitions" in chosen else []
    )

    def note(section: str, row: dict[str, Any]) -> None:
        kept.setdefault(section, []).append(row)
        print(section, row, flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def keep(result: Result) -> None:
        losses[result.name] = result.losses
        note("perplexity", scores(result, context))
        if uses:
            note("definitions", at_uses(result, uses))

    if "passkey" in chosen and setting["keys"]:
        many_pass_keys(pretrained, setting, functools.partial(note, "many pass keys"))
    elif "passkey" in chosen:
        pass_keys(pretrained, setting, functools.partial(note, "passkey"))
    if "perplexity" in chosen:
        read_every_way(pretrained.model, ids, setting, keep)
        plot(kept, losses, options.output.with_suffix(".png"))


def command(given: list[str]) -> str:
    """What was called, but for where its files are."""
    if "--output" in given:
        given = given[: given.index("--output")] + given[given.index("--output") + 2 :]
    return shlex.join(["benchmarks/pretrained.py", *(Path(part).name if "/" in part else part for part in given)])


def _processor() -> str:
    try:
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text("utf-8"))[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
