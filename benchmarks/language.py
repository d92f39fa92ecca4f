"""Perplexity by size of memory: language models trained without memory, trained with it, and fine-tuned to it.

After Memorizing Transformers (Wu et al. 2022, table 4 and section 4.4): four layers of which the third has the memory.
Three models start from the same parameters and read the same documents, segment by segment: one sees its segment
alone, one a Transformer-XL window besides, one also a memory. A fourth is the second, fine-tuned with memory for a part
of the steps. Those with memory are then tested with memories of several sizes on documents that none has seen.

The tokenizer is made on the spot: bytes, and the commonest words and runs of blanks. The corpus is the Python standard
library unless --corpus names a folder (books, sources, proofs), of which every file of at least --least bytes is a
document.

    nox -s bench -- language                                            # quick: one core, minutes
    nox -s bench -- language --full --corpus=hol-light --suffix=.ml     # the paper's sizes
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

RESULTS = Path(__file__).parent / "results"
QUICK = {
    "vocabulary": 1024, "dim": 96, "heads": 4, "segment": 128, "rows": 8, "steps": 300, "tune": 50, "rate": 3e-3,
    "capacity": 4096, "test": 16_384, "documents": 3, "memories": [0, 512, 1536, 4096, 16_384],
}  # fmt: skip
FULL = {
    "vocabulary": 8192, "dim": 512, "heads": 8, "segment": 512, "rows": 8, "steps": 50_000, "tune": 2_000, "rate": 3e-4,
    "capacity": 8192, "test": 131_072, "documents": 8, "memories": [0, 1536, 8192, 32_768, 65_536],
}  # fmt: skip
PIECE = re.compile(rb" ?[A-Za-z_]+|\n *| +|[0-9]|[^A-Za-z_0-9 \n]", re.DOTALL)


class Corpus:
    """Documents, the first few unseen in training, and the tokens they are made of."""

    def __init__(self, folder: Path, suffix: str, least: int, unseen: int, vocabulary: int):
        texts = [path.read_bytes() for path in sorted(folder.rglob(f"*{suffix}")) if path.stat().st_size >= least]
        if len(texts) <= unseen:
            raise SystemExit(f"{folder} has {len(texts)} files *{suffix} of {least} bytes; {unseen + 1} are needed")
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        self.texts, self.unseen = [texts[i] for i in order], unseen
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
    """Four layers; without memory the third is the same layer, deaf to it."""
    torch.manual_seed(0)
    local = {"dim": setting["dim"], "heads": setting["heads"], "segment": setting["segment"]}
    local["window"] = setting["segment"] if window else 0
    layers: list[Any] = [TransformerXLAttention(**local) for _ in range(4)]
    layers[2] = MemorizingAttention(**local, capacity=memory or 1, k=32, positions="t5")
    if not memory:
        with torch.no_grad():
            layers[2].gate.fill_(-1e9)
        layers[2].gate.requires_grad_(False)
    return MemoryTransformer(setting["vocabulary"], layers).to(device)


def with_memory(model: MemoryTransformer, setting: dict[str, Any], memory: int, device: str) -> MemoryTransformer:
    """A model of the parameters of `model` with a memory of another size; one that was deaf gets fresh gates."""
    made = build(setting, model.blocks[0].attention.reach > 0, memory, device)
    state = model.state_dict()
    if not memory or not model.blocks[2].attention.gate.requires_grad:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".gate")}
    made.load_state_dict(state, strict=False)
    return made


def train(model: MemoryTransformer, corpus: Corpus, steps: int, setting: dict[str, Any], device: str) -> None:
    """One segment of every row a step; a row that has read its document starts the next one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setting["rate"])
    rows, segment, memory = setting["rows"], setting["segment"], None
    taken = corpus.unseen + rows
    at = [[corpus.unseen + row, 0] for row in range(rows)]
    for step in range(steps):
        for group in optimizer.param_groups:  # a short rise, then a straight fall
            group["lr"] = setting["rate"] * min((step + 1) / 20, 1.02 - step / steps)
        pieces, start = [], []
        for place in at:
            if place[1] + segment + 1 > len(corpus.tokens(place[0])):  # an end that fills no segment is left out
                place[:] = corpus.unseen + taken % (len(corpus.texts) - corpus.unseen), 0
                taken += 1
            start.append(place[1] == 0)
            pieces.append(corpus.tokens(place[0])[place[1] : place[1] + segment + 1])
            place[1] += segment
        tokens = torch.stack(pieces).to(device)
        logits, memory = model(tokens[:, :-1], memory, torch.tensor(start, device=device))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def test(model: MemoryTransformer, corpus: Corpus, setting: dict[str, Any], device: str) -> tuple[float, float]:
    """Perplexity a token over the beginnings of unseen documents, and over the last quarter of these."""
    texts = [corpus.tokens(i) for i in range(corpus.unseen)]
    length = min(setting["test"], *(len(text) - 1 for text in texts))
    tokens = torch.stack([text[: length + 1] for text in texts]).to(device)
    nats, memory = [], None
    for first in range(0, length, setting["segment"]):
        wanted = tokens[:, first + 1 : min(first + setting["segment"], length) + 1]
        logits, memory = model(tokens[:, first : first + wanted.shape[1]], memory)
        nats.append(torch.nn.functional.cross_entropy(logits.mT, wanted, reduction="none"))
    each = torch.cat(nats, dim=1).double()
    return math.exp(each.mean().item()), math.exp(each[:, -(length // 4) :].mean().item())


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
    parser.add_argument("--least", type=int, default=70_000, help="bytes of the smallest document")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    setting = dict(FULL if options.full else QUICK)
    setting |= {"steps": options.steps or setting["steps"]}
    device, rows = options.device, list[dict[str, Any]]()
    corpus = Corpus(options.corpus, options.suffix, options.least, setting["documents"], setting["vocabulary"])

    def keep(name: str, memory: int | None, model: MemoryTransformer, begin: float) -> None:
        every, last = test(model, corpus, setting, device)
        row = {"model": name, "memory": memory, "perplexity": round(every, 3), "last quarter": round(last, 3)}
        rows.append(row | {"seconds": round(time.perf_counter() - begin, 1)})
        print(rows[-1], flush=True)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"language-{options.name}{'-full' if options.full else ''}.json"
        path.write_text(json.dumps(whole | {"rows": rows}, indent=1) + "\n", "utf-8")
        draw(rows, path.with_suffix(".png"))

    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}"
    whole = {"machine": machine, "torch": torch.__version__, "seed": 0, "corpus": options.name, "setting": setting}
    begin = time.perf_counter()
    alone = build(setting, False, 0, device)
    train(alone, corpus, setting["steps"], setting, device)
    keep("no window", None, alone, begin)
    begin = time.perf_counter()
    windowed = build(setting, True, 0, device)
    train(windowed, corpus, setting["steps"], setting, device)
    keep("Transformer-XL window", None, windowed, begin)
    begin = time.perf_counter()
    trained = build(setting, True, setting["capacity"], device)
    train(trained, corpus, setting["steps"], setting, device)
    tuned = with_memory(windowed, setting, setting["capacity"], device)
    train(tuned, corpus, setting["tune"], setting, device)
    whole["gates"] = {"trained": gates(trained), "tuned": gates(tuned)}
    for name, model in (("trained with memory", trained), ("trained without, tuned with memory", tuned)):
        for memory in setting["memories"]:
            keep(name, memory, with_memory(model, setting, memory, device), begin)
            begin = time.perf_counter()


def gates(model: MemoryTransformer) -> dict[str, list[float]]:
    """What the memory layer has learned: the share of memory, and the scale, of every head."""
    layer = model.blocks[2].attention
    return {"share": torch.sigmoid(layer.gate).tolist(), "scale": layer.scale.abs().tolist()}


if __name__ == "__main__":
    main()
