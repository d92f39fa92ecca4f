"""Perplexity by size of memory: language models trained without memory, trained with it, and fine-tuned to it.

After Memorizing Transformers (Wu et al. 2022, table 4 and section 4.4), with one layer that has the memory. Three
models start from the same parameters and read the same documents, segment by segment: one sees its segment alone, one a
Transformer-XL window besides, one also a memory. A fourth is the second, fine-tuned with memory for a part of the
steps. Those with memory are then tested with memories of several sizes on documents that none has seen.

To use a memory, a model must find what followed a context like the present one. Large models learn that late in
training, small ones in a benchmark of minutes not at all, so all models are given it to begin with, those without
memory for their windows: MemorizingAttention(keys="before", projections="equal"). A token then matches those that
followed tokens like it. `--keys=own --projections=apart` takes both away; results/learning.md tells what each does.

The tokenizer is made on the spot: bytes, and the commonest words and runs of blanks. The corpus is the Python standard
library unless --corpus names a folder (books, sources, proofs), of which every file of at least --least bytes is a
document; with --join every folder is, its files one after the other, as a repository is in the paper.

    nox -s bench -- language                                            # quick: one core, minutes
    nox -s bench -- language --name=python-long --join --test=98304     # and 65,536 tokens of memory: an hour
    nox -s bench -- language --name=hol-light --corpus=/usr/share/hol-light/Multivariate --suffix=.ml --without=database
    nox -s bench -- language --full --device=cuda                       # the paper's sizes
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import platform
import re
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from perdure.bindings.torch import MemorizingAttention, MemoryTransformer, TransformerXLAttention
from torch import nn

RESULTS = Path(__file__).parent / "results"
QUICK = {
    "vocabulary": 1024, "dim": 128, "heads": 4, "layers": 3, "with memory": 1, "segment": 128, "rows": 8,
    "steps": 300, "tune": 50, "rate": 3e-3, "tuning rate": 1e-3,
    "capacity": 4096, "test": 32_768, "documents": 3, "memories": [0, 512, 1536, 8192, 32_768],
}  # fmt: skip
FULL = {
    "vocabulary": 8192, "dim": 512, "heads": 8, "layers": 8, "with memory": 5, "segment": 512, "rows": 8,
    "steps": 50_000, "tune": 2_000, "rate": 3e-4, "tuning rate": 1e-4,
    "capacity": 8192, "test": 131_072, "documents": 8, "memories": [0, 1536, 8192, 32_768, 65_536],
}  # fmt: skip
PIECE = re.compile(rb" ?[A-Za-z_]+|\n *| +|[0-9]|[^A-Za-z_0-9 \n]", re.DOTALL)
BYTES = 3  # of a token, about: texts that are tested on are at least so long
INSTALLED = {"site-packages", "dist-packages"}  # in the folder of the standard library, but no part of it
RETURNING = 4  # a token returns if that many before it came before, beyond the window


class Corpus:
    """Documents, the first few unseen in training and long enough to be tested on, and the tokens they are made of."""

    def __init__(self, options: argparse.Namespace, unseen: int, test: int, vocabulary: int):
        folder, without = options.corpus, options.without
        paths = [path for path in sorted(folder.rglob(f"*{options.suffix}")) if not INSTALLED & set(path.parts[:-1])]
        parts = collections.defaultdict[Path, list[bytes]](list)
        for path in paths:
            if not (without and without in path.name):
                title = f"{path.name}\n".encode() if options.join else b""
                parts[path.parent if options.join else path].append(title + path.read_bytes())
        texts = [text for text in map(b"\n".join, parts.values()) if len(text) >= options.least]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        long = [i for i in order if len(texts[i]) >= BYTES * test][:unseen]
        if len(long) < unseen or len(texts) <= unseen:
            raise SystemExit(f"{folder} has {len(texts)} documents, {len(long)} of them long; {unseen} are tested on")
        self.texts, self.unseen = [texts[i] for i in [*long, *(i for i in order if i not in long)]], unseen
        counted: collections.Counter[bytes] = collections.Counter()
        for text in self.texts[unseen : unseen + 100]:
            counted.update(PIECE.findall(text))
        common = sorted((p for p in counted if len(p) > 1), key=lambda p: -counted[p] * (len(p) - 1))
        self.numbers = {piece: 256 + i for i, piece in enumerate(common[: vocabulary - 256])}

    @functools.lru_cache  # noqa: B019
    def tokens(self, document: int) -> torch.Tensor:
        """Every piece of the vocabulary as one token, every other byte by byte."""
        found: list[int] = []
        for piece in PIECE.findall(self.texts[document]):
            number = self.numbers.get(piece)
            found += piece if number is None else [number]
        return torch.tensor(found)


def build(setting: dict[str, Any], window: bool, memory: int, device: str) -> MemoryTransformer:
    """Some layers; without memory the one with memory is the same layer, deaf to it."""
    torch.manual_seed(setting["seed"])
    local = {"dim": setting["dim"], "heads": setting["heads"], "segment": setting["segment"]}
    local["window"] = setting["segment"] if window else 0
    layers: list[Any] = [TransformerXLAttention(**local) for _ in range(setting["layers"])]
    looking = {"k": 32, "positions": "t5"} | {name: setting[name] for name in ("scale", "keys", "projections")}
    layers[setting["with memory"]] = layer = MemorizingAttention(**local, capacity=memory or 1, **looking)
    if not memory:
        nn.init.constant_(layer.gate, -1e9).requires_grad_(False)
    return MemoryTransformer(setting["vocabulary"], layers).to(device)


def with_memory(model: MemoryTransformer, setting: dict[str, Any], memory: int, device: str) -> MemoryTransformer:
    """A model of the parameters of `model` with a memory of another size; one that was deaf gets fresh gates."""
    made = build(setting, model.blocks[0].attention.reach > 0, memory, device)
    state = model.state_dict()
    if not memory or not model.blocks[setting["with memory"]].attention.gate.requires_grad:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".gate")}
    made.load_state_dict(state, strict=False)
    return made


def train(model: MemoryTransformer, corpus: Corpus, steps: int, rate: float, setting: dict[str, Any]) -> None:
    """One segment of every row a step; a row that has read its document starts the next one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.98))
    rows, segment, memory = setting["rows"], setting["segment"], None
    seen = len(corpus.texts) - corpus.unseen
    taken, device = rows, model.embedding.weight.device
    at = [[corpus.unseen + row % seen, 0] for row in range(rows)]
    for row, place in enumerate(at):  # where documents are fewer than rows, rows share one and read apart
        place[1] = len(corpus.tokens(place[0])) * (row // seen) // (rows // seen + 1)
    for step in range(steps):
        for group in optimizer.param_groups:  # a short rise, then a straight fall
            group["lr"] = rate * min((step + 1) / 30, 1.02 - step / steps)
        pieces, start = [], []
        for place in at:
            if place[1] + segment + 1 > len(corpus.tokens(place[0])):  # an end that fills no segment is left out
                place[:] = corpus.unseen + taken % seen, 0
                taken += 1
            start.append(place[1] == 0)
            pieces.append(corpus.tokens(place[0])[place[1] : place[1] + segment + 1])
            place[1] += segment
        tokens = torch.stack(pieces).to(device)
        logits, memory = model(tokens[:, :-1], memory, torch.tensor(start, device=device))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def test(model: MemoryTransformer, corpus: Corpus, setting: dict[str, Any]) -> dict[str, float]:
    """Perplexity a token over the beginnings of unseen documents, over the last quarter of these, and where texts
    repeat themselves: of tokens that return and of all others."""
    texts, device = [corpus.tokens(i) for i in range(corpus.unseen)], model.embedding.weight.device
    length = min(setting["test"], *(len(text) - 1 for text in texts))
    tokens = torch.stack([text[: length + 1] for text in texts]).to(device)
    nats, memory = [], None
    for first in range(0, length, setting["segment"]):
        wanted = tokens[:, first + 1 : min(first + setting["segment"], length) + 1]
        logits, memory = model(tokens[:, first : first + wanted.shape[1]], memory)
        nats.append(nn.functional.cross_entropy(logits.mT, wanted, reduction="none"))
    each = torch.cat(nats, dim=1).double().cpu()
    again = torch.tensor([returning(row, 2 * setting["segment"]) for row in tokens.tolist()])
    parts = {"perplexity": each, "last quarter": each[:, -(length // 4) :], "returning": each[again]}
    parts["others"] = each[~again]
    return {name: round(math.exp(part.mean().item()), 3) for name, part in parts.items()}


def returning(tokens: list[int], window: int) -> list[bool]:
    """Of every token but the first, whether the few before it came before, the last time beyond the window."""
    last, found = dict[tuple[int, ...], int](), []
    for i in range(1, len(tokens)):
        context = tuple(tokens[max(i - RETURNING, 0) : i])
        found.append(context in last and i - last[context] > window)
        last[context] = i
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for row in rows:
        if row["memory"] is None:
            axis.axhline(row["perplexity"], color="grey", linestyle=":")
            axis.annotate(row["model"], (0, row["perplexity"]), fontsize=8)
    for name in dict.fromkeys(row["model"] for row in rows if row["memory"] is not None):
        own = [row for row in rows if row["model"] == name]
        axis.plot([row["memory"] for row in own], [row["perplexity"] for row in own], "o-", label=name)
    axis.set_xscale("symlog", linthresh=512)
    axis.set(xlabel="tokens of memory", ylabel="perplexity a token")
    if any(row["memory"] is not None for row in rows):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--name", default="python", help="of the corpus, in what is kept")
    parser.add_argument("--suffix", default=".py")
    parser.add_argument("--without", help="leave out files with this in their names")
    parser.add_argument("--least", type=int, default=70_000, help="bytes of the smallest document")
    parser.add_argument("--join", action="store_true", help="the files of a folder are one document")
    parser.add_argument("--test", type=int, help="tokens of each document tested on")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--keys", choices=("before", "own"), default="before", help="what keys are made of")
    parser.add_argument("--projections", choices=("equal", "apart"), default="equal", help="how they start")
    parser.add_argument("--scale", type=float, help="where the scales start; sqrt(head_dim) if not given")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    setting = dict(FULL if options.full else QUICK)
    setting |= {"steps": options.steps or setting["steps"], "test": options.test or setting["test"]}
    setting |= {name: getattr(options, name) for name in ("keys", "projections", "scale", "seed")}
    if setting["test"] > 65_536 > max(setting["memories"]):
        setting["memories"] = [*setting["memories"], 65_536]
    device, rows = options.device, list[dict[str, Any]]()
    corpus = Corpus(options, setting["documents"], setting["test"], setting["vocabulary"])
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}"
    documents = {"documents": len(corpus.texts), "tested": [len(corpus.tokens(i)) for i in range(corpus.unseen)]}
    whole = {"machine": machine, "torch": torch.__version__, "corpus": options.name, **documents, "setting": setting}
    path = RESULTS / f"language-{options.name}{'-full' if options.full else ''}.json"

    def keep(name: str, memory: int | None, model: MemoryTransformer, trained: float) -> None:
        begin = time.perf_counter()
        row = {"model": name, "memory": memory, **test(model, corpus, setting)}
        rows.append(row | {"training s": round(trained), "test s": round(time.perf_counter() - begin)})
        print(rows[-1], flush=True)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(whole | {"rows": rows}, indent=1) + "\n", "utf-8")
        draw(rows, path.with_suffix(".png"))

    def trained(model: MemoryTransformer, steps: str = "steps", rate: str = "rate") -> tuple[MemoryTransformer, float]:
        begin = time.perf_counter()
        train(model, corpus, setting[steps], setting[rate], setting)
        return model, time.perf_counter() - begin

    keep("no window", None, *trained(build(setting, False, 0, device)))
    windowed, seconds = trained(build(setting, True, 0, device))
    keep("Transformer-XL window", None, windowed, seconds)
    learned = trained(build(setting, True, setting["capacity"], device))
    tuned = trained(with_memory(windowed, setting, setting["capacity"], device), "tune", "tuning rate")
    whole["gates"] = {"trained": gates(learned[0], setting), "tuned": gates(tuned[0], setting)}
    for name, (model, seconds) in (("trained with memory", learned), ("trained without, tuned with memory", tuned)):
        for memory in setting["memories"]:
            keep(name, memory, with_memory(model, setting, memory, device), seconds)


def gates(model: MemoryTransformer, setting: dict[str, Any]) -> dict[str, list[float]]:
    """What the memory layer has learned: the share of memory, and the scale, of every head."""
    layer = model.blocks[setting["with memory"]].attention
    return {"share": torch.sigmoid(layer.gate).tolist(), "scale": layer.scale.abs().tolist()}


if __name__ == "__main__":
    main()
