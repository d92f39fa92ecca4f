"""Sort the tokens of a long sequence by how often they came: which memories still know, as sequences grow.

The task of the ∞-former (Martins et al. 2022, section 4.1), with the generator of its authors: token j of L is drawn
from (1 - r) p0 + r p1, r = (j + 1)/L, over 20 tokens, so that what is frequent changes on the way; the answer lists
the tokens by falling count. Every model reads the sequence segment by segment and learns on the answer alone, from the
same sequences in the same order.

    nox -s bench -- sorting                      # quick: two cores, minutes
    nox -s bench -- sorting --full --device=cuda # the paper's sizes
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from perdure.bindings.torch import (
    CompressiveAttention,
    ContinuousAttention,
    MemorizingAttention,
    MemoryTransformer,
    TransformerXLAttention,
)

TOKENS = 20
SEPARATOR = TOKENS
QUICK = {
    "lengths": [128, 256, 512], "dim": 48, "heads": 4, "layers": 2, "segment": 64, "window": 64, "basis": 64,
    "batch": 16, "steps": 400, "rate": 3e-3, "test": 64,
}  # fmt: skip
FULL = {
    "lengths": [4096, 8192, 16384], "dim": 300, "heads": 6, "layers": 3, "segment": 1024, "window": 1024, "basis": 512,
    "batch": 8, "steps": 20_000, "rate": 2e-4, "test": 800,
}  # fmt: skip


def sequences(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences with their answers, (count, length + 1 + TOKENS)."""
    p = torch.randint(1, 10, (2, count, TOKENS), generator=generator).double()
    p /= p.sum(dim=-1, keepdim=True)
    r = (torch.arange(length) + 1) / length
    mixed = (1 - r)[:, None] * p[0][:, None] + r[:, None] * p[1][:, None]  # (count, length, TOKENS)
    tokens = torch.multinomial(mixed.flatten(0, 1), 1, generator=generator).view(count, length)
    counts = torch.nn.functional.one_hot(tokens, TOKENS).sum(dim=1)
    first = torch.full((count, TOKENS), length).scatter_reduce(
        1, tokens, torch.arange(length).expand(count, -1), "amin"
    )  # ties in the order of first occurrence; tokens that never came follow, ascending
    order = (counts * (length + TOKENS + 1) - torch.minimum(first, length + torch.arange(TOKENS))).argsort(
        dim=1, descending=True, stable=True
    )
    return torch.cat([tokens, torch.full((count, 1), SEPARATOR), order], dim=1)


def models(setting: dict[str, Any], length: int) -> dict[str, Callable[[], MemoryTransformer]]:
    """How each model is built; memories beyond the window hold as much as the window does."""
    common = {name: setting[name] for name in ("dim", "heads", "segment", "window")}
    # the signal has half the window's place, so that it and a halved window cost what the window does
    signal = {"basis": setting["basis"], "samples": setting["basis"], "contraction": 0.75}
    half = setting["window"] // 2

    def build(*kinds: Callable[[], Any]) -> Callable[[], MemoryTransformer]:
        return lambda: MemoryTransformer(TOKENS + 1, [kind() for kind in kinds])

    def xl() -> Any:
        return TransformerXLAttention(**common)

    def compressive() -> Any:
        return CompressiveAttention(**{**common, "window": half}, compressed=half, rate=4)

    def infinite(sticky: bool) -> Callable[[], Any]:
        return lambda: ContinuousAttention(**{**common, "window": half}, **signal, sticky=sticky)

    def memorizing() -> Any:
        return MemorizingAttention(**common, capacity=length, k=32, positions="t5")

    layers = setting["layers"]
    return {
        "Transformer-XL": build(*[xl] * layers),
        "Compressive": build(*[compressive] * layers),
        "∞-former": build(*[infinite(False)] * layers),
        "∞-former, sticky": build(*[infinite(True)] * layers),
        "Memorizing": build(*[xl] * (layers - 1), memorizing),
    }


def answer(model: MemoryTransformer, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (rows, TOKENS, vocabulary) of the answer, read after the sequence, and what memory's regularisers ask."""
    read = batch.shape[1] - TOKENS - 1
    with torch.no_grad():  # no gradient crosses a segment, and the answer lies in the last
        _, memory = model(batch[:, :read])
    logits, memory = model(batch[:, read:-1], memory)
    extra = [state.loss for state in memory if getattr(state, "loss", None) is not None]
    return logits, sum(extra, logits.new_zeros(()))


def train(model: MemoryTransformer, length: int, setting: dict[str, Any], device: str, limit: float) -> dict[str, Any]:
    """Train on fresh sequences, then test; the share of the answer's tokens that are right."""
    optimizer = torch.optim.Adam(model.parameters(), lr=setting["rate"])
    generator = torch.Generator().manual_seed(length)
    begin, taken, losses = time.perf_counter(), 0, []
    for step in range(setting["steps"]):
        if time.perf_counter() - begin > limit:
            break
        for group in optimizer.param_groups:  # a short rise, then a straight fall
            group["lr"] = setting["rate"] * min((step + 1) / 20, 1.05 - step / setting["steps"])
        batch = sequences(setting["batch"], length, generator).to(device)
        logits, extra = answer(model, batch)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -TOKENS:].flatten())
        optimizer.zero_grad()
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        taken += 1
    seconds, right = time.perf_counter() - begin, []
    test = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(max(setting["test"] // 16, 1)):
            batch = sequences(16, length, test).to(device)
            right.append((answer(model, batch)[0].argmax(-1) == batch[:, -TOKENS:]).float().mean().item())
    recent = losses[-20:]
    return {
        "accuracy": sum(right) / len(right),
        "loss": sum(recent) / len(recent),
        "steps": taken,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--only", help="a part of the names of the models to train")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds of training a model and length")
    parser.add_argument("--output", type=Path, help="where the table and all settings are kept, as JSON")
    options = parser.parse_args()
    setting = dict(FULL if options.full else QUICK)
    setting |= {name: getattr(options, name) for name in ("steps", "lengths") if getattr(options, name)}
    results: dict[str, dict[str, Any]] = {}
    for length in setting["lengths"]:
        for name, build in models(setting, length).items():
            if options.only and options.only not in name:
                continue
            torch.manual_seed(0)
            result = train(build().to(options.device), length, setting, options.device, options.limit)
            results.setdefault(name, {})[str(length)] = result
            print(f"{length:6} {name:18} {result}", flush=True)
            if options.output:
                machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
                kept = {"setting": setting, "machine": machine, "torch": torch.__version__, "results": results}
                options.output.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    print(f"{'accuracy':18}" + "".join(f"{n:>8}" for n in setting["lengths"]), file=sys.stderr)
    for name, by_length in results.items():
        print(f"{name:18}" + "".join(f"{r['accuracy']:8.3f}" for r in by_length.values()), file=sys.stderr)


if __name__ == "__main__":
    main()
