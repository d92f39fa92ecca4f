"""Train a byte-level language model with memory on the Python standard library, and resume it bit by bit.

    python docs/examples/train_language_model.py --steps 200 --checkpoint run.pt
    python docs/examples/train_language_model.py --steps 400 --checkpoint run.pt    # goes on where the first stopped

Every row of the batch reads files one after the other, a segment a step. Where a row begins a new file, `start` tells
the model to forget the last one; where a file ends inside a segment, `mask` marks the rest as padding.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from perdure.bindings.torch import MemorizingAttention, MemoryTransformer, TransformerXLAttention
from torch.nn.functional import cross_entropy


@dataclass
class Reader:
    """Rows of bytes, a segment at a time: which file each row reads, and how far it is."""

    files: list[str]
    rows: int
    segment: int
    taken: int = 0  # files handed out so far
    reading: list[int] = field(default_factory=list)  # the file of each row
    offset: list[int] = field(default_factory=list)  # bytes of it that are read

    def __post_init__(self) -> None:
        if not self.reading:
            self.reading, self.offset = [-1] * self.rows, [0] * self.rows

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (rows, segment + 1), of which each is the target of the one before, start (rows,) and mask."""
        tokens = torch.zeros(self.rows, self.segment + 1, dtype=torch.int64)
        start = torch.zeros(self.rows, dtype=torch.bool)
        mask = torch.zeros(self.rows, self.segment, dtype=torch.bool)
        for row in range(self.rows):
            text = self._text(row)
            if self.reading[row] < 0 or self.offset[row] + 1 >= len(text):
                self.reading[row], self.offset[row] = self.taken % len(self.files), 0
                self.taken += 1
                start[row], text = True, self._text(row)
            piece = text[self.offset[row] : self.offset[row] + self.segment + 1]
            tokens[row, : len(piece)] = torch.tensor(list(piece))
            mask[row, : len(piece) - 1] = True
            self.offset[row] += self.segment
        return tokens, start, mask

    def _text(self, row: int) -> bytes:
        return b"" if self.reading[row] < 0 else Path(self.files[self.reading[row]]).read_bytes()


def standard_library(least: int = 20_000) -> list[str]:
    """Files of Python's own library of at least so many bytes, in an order that is no alphabet's."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size >= least)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return [str(files[i]) for i in order]


def build(segment: int) -> MemoryTransformer:
    """Three layers, the middle one with a kNN memory."""
    torch.manual_seed(0)
    local = {"dim": 128, "heads": 4, "segment": segment, "window": segment}
    memorizing = MemorizingAttention(**local, capacity=16_384, k=16, positions="t5")
    return MemoryTransformer(
        256, [TransformerXLAttention(**local), memorizing, TransformerXLAttention(**local)], dropout=0.1
    )


def train(options: argparse.Namespace, files: list[str]) -> list[float]:
    """Train until `options.steps`, from the checkpoint if there is one; the loss of every step taken now, in bits."""
    model = build(options.segment)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    reader, memory, step, losses = Reader(files, options.rows, options.segment), model.memory(options.rows), 0, []
    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        memory = model.memory_from_state_dict(saved["memory"])
        torch.set_rng_state(saved["generator"])  # dropout goes on where it was
        reader, step = Reader(**saved["reader"]), saved["step"]
        print(f"resumed after step {step}")
    begin = time.perf_counter()
    while step < options.steps:
        tokens, start, mask = reader.next()
        logits, memory = model(tokens[:, :-1], memory, start, mask)
        loss = cross_entropy(logits[mask], tokens[:, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item() / 0.6931471805599453)
        show(step, options.steps, losses, memory[1].tokens.tolist(), begin)
        if options.checkpoint and (step % options.every == 0 or step == options.steps):
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            saved |= {"memory": model.memory_state_dict(memory), "reader": asdict(reader)}
            saved["generator"] = torch.get_rng_state()
            partial = options.checkpoint.with_suffix(".partial")
            torch.save(saved, partial)
            os.replace(partial, options.checkpoint)  # a reader finds the old file or the new one, never half of one
    return losses


def show(step: int, steps: int, losses: list[float], remembered: list[int], begin: float) -> None:
    """One line that rewrites itself."""
    recent = losses[-20:]
    bar = "#" * (24 * step // steps)
    left = (time.perf_counter() - begin) / len(losses) * (steps - step)
    line = f"[{bar:24}] {step}/{steps}  {sum(recent) / len(recent):.3f} bits/byte  remembers {remembered}  {left:.0f} s"
    print(f"\r{line}", end="\n" if step == steps else "", flush=True, file=sys.stderr)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--checkpoint", type=Path)
    return parser.parse_args(given)


if __name__ == "__main__":
    train(arguments(), standard_library())
