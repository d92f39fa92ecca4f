"""Perplexity by size of memory: one byte-level language model, trained without memory, with it, and fine-tuned to it.

After Memorizing Transformers (Wu et al. 2022, table 4 and section 4.4): four layers of which the third has the memory.
Models see long documents segment by segment; each size of memory is trained from the same start on the same bytes, and
tested on documents that no model has seen. The corpus is the Python standard library unless --corpus names a folder
(books, sources, proofs), of which every file of at least --least bytes is a document.

    nox -s bench -- language                                            # quick: two cores, minutes
    nox -s bench -- language --full --corpus=hol-light --suffix=.ml     # the paper's sizes
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from perdure.bindings.torch import MemorizingAttention, MemoryTransformer, TransformerXLAttention

QUICK = {
    "dim": 96, "heads": 4, "segment": 128, "rows": 4, "steps": 250, "tune": 60, "rate": 2e-3, "test": 8192,
    "memories": [None, 0, 1024, 4096, 16_384],
}  # fmt: skip
FULL = {
    "dim": 512, "heads": 8, "segment": 512, "rows": 8, "steps": 50_000, "tune": 2_000, "rate": 3e-4, "test": 262_144,
    "memories": [None, 0, 1536, 8192, 32_768, 65_536],
}  # fmt: skip


def documents(folder: Path, suffix: str, least: int) -> list[bytes]:
    """Every file of at least `least` bytes, in one order for all."""
    texts = [path.read_bytes() for path in sorted(folder.rglob(f"*{suffix}")) if path.stat().st_size >= least]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[i] for i in order]


def build(setting: dict[str, Any], memory: int | None) -> MemoryTransformer:
    """None: segments alone; 0: with a Transformer-XL window; else also a memory of that many tokens."""
    torch.manual_seed(0)
    local = {"dim": setting["dim"], "heads": setting["heads"], "segment": setting["segment"]}
    local["window"] = 0 if memory is None else setting["segment"]
    layers: list[Any] = [TransformerXLAttention(**local) for _ in range(4)]
    layers[2] = MemorizingAttention(**local, capacity=memory or 1, k=32, positions="t5")
    model = MemoryTransformer(256, layers)
    if not memory:
        with torch.no_grad():  # the same layer, deaf to its memory
            layers[2].gate.fill_(-1e9)
        layers[2].gate.requires_grad_(False)
    return model


class Reader:
    """Rows of documents, a segment at a time; a row that has read its document starts the next one."""

    def __init__(self, texts: list[bytes], rows: int, segment: int):
        self.texts, self.segment, self.taken = texts, segment, rows
        self.at = [[row % len(texts), 0] for row in range(rows)]

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (rows, segment + 1) and start (rows,); the end of a document that fills no segment is left out."""
        tokens, start = [], []
        for place in self.at:
            if place[1] + self.segment + 1 > len(self.texts[place[0]]):
                place[:] = self.taken % len(self.texts), 0
                self.taken += 1
            start.append(place[1] == 0)
            tokens.append(list(self.texts[place[0]][place[1] : place[1] + self.segment + 1]))
            place[1] += self.segment
        return torch.tensor(tokens), torch.tensor(start)


def train(model: MemoryTransformer, texts: list[bytes], steps: int, setting: dict[str, Any], limit: float) -> int:
    """Steps taken, each on one segment of every row."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setting["rate"])
    reader, memory, begin = Reader(texts, setting["rows"], setting["segment"]), None, time.perf_counter()
    for step in range(steps):
        if time.perf_counter() - begin > limit:
            return step
        for group in optimizer.param_groups:
            group["lr"] = setting["rate"] * min((step + 1) / 20, 1.02 - step / steps)
        tokens, start = reader.next()
        logits, memory = model(tokens[:, :-1], memory, start)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return steps


@torch.no_grad()
def test(model: MemoryTransformer, texts: list[bytes], setting: dict[str, Any]) -> float:
    """Bits a byte over the first bytes of unseen documents, `test` of each."""
    length = min(setting["test"], min(map(len, texts)) - 1)
    tokens = torch.tensor([list(text[: length + 1]) for text in texts])
    bits, memory, segment = [], None, setting["segment"]
    for first in range(0, length, segment):
        wanted = tokens[:, first + 1 : min(first + segment, length) + 1]
        logits, memory = model(tokens[:, first : first + wanted.shape[1]], memory)
        bits.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none"))
    return torch.cat(bits).mean().item() / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--suffix", default=".py")
    parser.add_argument("--least", type=int, default=40_000, help="bytes of the smallest document")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tune", type=int)
    parser.add_argument("--memories", type=lambda text: [None if n == "none" else int(n) for n in text.split(",")])
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds of training a model")
    parser.add_argument("--output", type=Path, help="where the table and all settings are kept, as JSON")
    options = parser.parse_args()
    setting = dict(FULL if options.full else QUICK)
    setting |= {name: given for name in ("steps", "tune", "memories") if (given := getattr(options, name)) is not None}
    texts = documents(options.corpus, options.suffix, options.least)
    unseen, seen = texts[:6], texts[6:]
    rows: list[dict[str, Any]] = []

    def keep(name: str, memory: int | None, model: MemoryTransformer, steps: int, begin: float) -> None:
        row = {"model": name, "memory": memory, "steps": steps, "bits a byte": test(model, unseen, setting)}
        rows.append(row | {"seconds": round(time.perf_counter() - begin, 1)})
        print(rows[-1], flush=True)
        if options.output:
            machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
            kept = {"setting": setting, "corpus": str(options.corpus.name), "machine": machine, "rows": rows}
            options.output.write_text(json.dumps(kept, indent=1) + "\n")

    without: dict[str, torch.Tensor] = {}
    for memory in setting["memories"]:
        begin, model = time.perf_counter(), build(setting, memory)
        steps = train(model, seen, setting["steps"], setting, options.limit)
        keep("trained so", memory, model, steps, begin)
        if memory == 0:
            without = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if without and max(m or 0 for m in setting["memories"]):
        begin, memory = time.perf_counter(), max(m or 0 for m in setting["memories"])
        model = build(setting, memory)
        gates = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".gate")}
        model.load_state_dict(without | gates)
        steps = train(model, seen, setting["tune"], setting, options.limit)
        keep("trained without, tuned", memory, model, steps, begin)


if __name__ == "__main__":
    main()
