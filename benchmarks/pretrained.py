"""What memory does for a real pretrained model, SmolLM2-135M with a context of 8192 tokens, without any training.

    nox -s bench -- pretrained                                   # quick: two cores, five minutes
    nox -s bench -- pretrained --full --document=topology.ml     # hours

1. perplexity: one long document in windows of 512 tokens, within the context and beyond it, against windows alone, the
   previous window, the same with the document's first tokens, the same with positions counted anew (StreamingLLM), and
   full attention as far as it goes.
2. passkey: a number hidden in a long text and asked for at its end, by length and depth. With --keys=N, N of them in
   one text, asked for after each of --lengths of one reading: one by one, the memories of the others overwritten,
   and by its first two digits, with all of them there.
3. definitions: the loss at uses of identifiers whose last mention is so far back that only memory reaches it, and how
   often what was retrieved there is one of those mentions. It takes its losses from the runs of 1.
4. time, only where asked for: processor time of the next window, and of one more token, after each of --lengths.

The document is a file of Python's standard library unless --document names one. What was found: results/pretrained.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import platform
import re
import shlex
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import processor
from _pass_keys import WINDOW, many_pass_keys, pass_keys
from perdure.bindings.demo.methods import Result, with_cache, with_memory, without_memory
from perdure.bindings.pretrained import smollm2
from perdure.bindings.transformers import attach, detach
from perdure.bindings.transformers.document import token_ids
from transformers import DynamicCache

RESULTS = Path(__file__).parent / "results"
SINKS, FAR, DEFAULT = 4, 1024, "_pydecimal.py"
POSITIONS = ("clamped", "true", "constant")
QUICK: dict[str, Any] = {
    "tokens": 10_240, "k": [32], "memory": ["all"], "positions": POSITIONS[:1], "lengths": [4096], "depths": [0.1, 0.6],
}  # fmt: skip
FULL: dict[str, Any] = {
    "tokens": 32_768, "k": [8, 32, 128], "memory": [2048, 8192, "all"], "positions": POSITIONS,
    "lengths": [4096, 8192, 16_384, 32_768, 65_536, 131_072], "depths": [0.1, 0.3, 0.5, 0.7, 0.9],
}  # fmt: skip


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


# ---- 4. time --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def times(model: Any, ids: torch.Tensor, setting: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """What comes after n tokens of the document, by full attention as far as it goes and by perdure."""

    def call(part: torch.Tensor, cache: DynamicCache | None) -> None:
        model(part, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)

    def took(many: int, part: torch.Tensor, cache: DynamicCache | None) -> float:
        seconds = []
        for _ in range(many):
            start = time.process_time()
            call(part, cache)
            seconds.append(time.process_time() - start)
            if cache is not None:
                cache.crop(-part.shape[1])
        return 1000 * statistics.median(seconds[1:])  # the first compiles

    def row(n: int, way: str, window: float, one: float) -> None:
        keep({"after": n, "way": way, "ms a token of a window": round(window / WINDOW, 2), "one": round(one, 1)})

    lengths, done, cache = sorted(setting["lengths"]), 0, DynamicCache(config=model.config)
    for n in (n for n in lengths if n <= setting["full to"]):
        for start in range(done, n, WINDOW):
            call(ids[:, start : start + WINDOW], cache)
        following, done = ids[:, n : n + WINDOW], n
        row(n, "full attention", took(4, following, cache), took(12, following[:, :1], cache))
    memory, done = attach(model, capacity=lengths[-1], index=setting["index"], **setting["further"]), 0
    try:
        for n in lengths:
            memory.read_document(ids[:, done:n], progress=False, retrieve=False)
            following, done, cache = ids[:, n : n + WINDOW], n, DynamicCache(config=model.config)
            with memory.frozen():
                window = took(6, following, None)
                call(following[:, : WINDOW // 2], cache)  # a question, whose answer has begun
                row(n, "perdure", window, took(12, following[:, -1:], cache))
    finally:
        detach(model)


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
        "machine": f"{processor()}, {torch.get_num_threads()} threads, Python {platform.python_version()}",
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
    if "time" in chosen:
        times(pretrained.model, ids, setting, functools.partial(note, "time"))
    if "perplexity" in chosen:
        read_every_way(pretrained.model, ids, setting, keep)
        plot(kept, losses, options.output.with_suffix(".png"))


def command(given: list[str]) -> str:
    """What was called, but for where its files are."""
    if "--output" in given:
        given = given[: given.index("--output")] + given[given.index("--output") + 2 :]
    return shlex.join(["benchmarks/pretrained.py", *(Path(part).name if "/" in part else part for part in given)])


if __name__ == "__main__":
    main()
