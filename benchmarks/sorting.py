"""Sort the tokens of a long sequence by how often they came: which memories still know, as sequences grow.

The task of the ∞-former (Martins et al. 2022, section 4.1), with the generator of its authors: token j of L is drawn
from (1 - r) p0 + r p1, r = (j + 1)/L, so that what is frequent changes on the way; the answer lists the tokens by
falling count. Every model reads the sequence segment by segment and learns on the answer alone, from the same
sequences in the same order. A length counts the sequence, the separator and the answer, which end a segment together.

The full setting trains a model for each length, as the paper does. The quick one has half the tokens to sort, and
a quarter of the paper's segments and lengths; it leads one model from short sequences to long ones, testing it at each
length. What the memories are made of is in `models`.

    nox -s bench -- sorting                      # quick: two cores, minutes
    nox -s bench -- sorting --full --device=cuda # the paper's sizes
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _machine import processor
from perdure.bindings.torch import (
    CompressiveAttention,
    ContinuousAttention,
    MemorizingAttention,
    MemoryTransformer,
    TransformerXLAttention,
)

RESULTS = Path(__file__).parent / "results"
QUICK = {
    "tokens": 10, "dim": 48, "heads": 2, "layers": 2, "segment": 256, "window": 256, "basis": 64, "contraction": 0.9,
    "compression": 32, "k": 512, "combine": "gate", "rate": 3e-3, "gates": 30, "layer": 0,
    "test": 48, "courses": [[(64, 600, 16), (256, 150, 16), (512, 40, 8), (1024, 50, 8), (2048, 40, 8), (4096, 40, 8)]],
}  # fmt: skip
FULL = {
    "tokens": 20, "dim": 300, "heads": 6, "layers": 3, "segment": 1024, "window": 1024, "basis": 512,
    "contraction": 0.75, "compression": 32, "k": 1024, "combine": "gate", "rate": 2e-4, "gates": 30, "layer": 0,
    "test": 800, "courses": [[(4096, 20_000, 8)], [(8192, 20_000, 8)], [(16_384, 20_000, 8)]],
}  # fmt: skip
TRIED = {"window": int, "contraction": float, "k": int, "combine": str, "gates": float, "layer": int}


def sequences(count: int, length: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences, their separator and their answer, (count, length)."""
    length -= tokens + 1
    p = torch.randint(1, 10, (2, count, tokens), generator=generator).double()
    p /= p.sum(dim=-1, keepdim=True)
    r = (torch.arange(length) + 1) / length
    mixed = (1 - r)[:, None] * p[0][:, None] + r[:, None] * p[1][:, None]  # (count, length, tokens)
    drawn = torch.multinomial(mixed.flatten(0, 1), 1, generator=generator).view(count, length)
    return torch.cat([drawn, torch.full((count, 1), tokens), by_count(drawn, tokens)], dim=1)


def by_count(drawn: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens by falling count; ties in the order of first occurrence, those that never came last, ascending."""
    count, length = drawn.shape
    counts = torch.zeros(count, tokens, dtype=torch.int64).scatter_add(1, drawn, torch.ones_like(drawn))
    place = torch.arange(length).expand(count, -1)
    first = torch.full((count, tokens), length).scatter_reduce(1, drawn, place, "amin")
    rank = counts * (length + tokens + 1) - torch.minimum(first, length + torch.arange(tokens))
    return rank.argsort(dim=1, descending=True, stable=True)


def models(setting: dict[str, Any], length: int) -> dict[str, Callable[[], MemoryTransformer]]:
    """How each model is built; memories of fixed size take half of Transformer-XL's window.

    The kNN memory is that of one layer, the first, so that a layer above can compare what was looked up. Its keys are
    made of the token before, so that neighbours are what followed one kind of token, and no copies of one.

    The compressive one pools: a mean of states needs no training to tell how often a token came. The signals contract
    slowly, so that the first of 16 segments has not shrunk to nothing beside the last.
    """
    common = {name: setting[name] for name in ("dim", "heads", "segment", "window")}
    signal = {"basis": setting["basis"], "samples": setting["basis"], "contraction": setting["contraction"]}
    half = setting["window"] // 2

    def build(*kinds: Callable[[], Any]) -> Callable[[], MemoryTransformer]:
        return lambda: MemoryTransformer(setting["tokens"] + 1, [kind() for kind in kinds])

    def xl() -> Any:
        return TransformerXLAttention(**common)

    def compressive() -> Any:
        return CompressiveAttention(
            **{**common, "window": half}, compressed=half, rate=setting["compression"], method="mean"
        )

    def infinite(sticky: bool) -> Callable[[], Any]:
        return lambda: ContinuousAttention(**{**common, "window": half}, **signal, sticky=sticky)

    def memorizing() -> Any:
        looking = {"k": setting["k"], "combine": setting["combine"], "overlap": False}
        return MemorizingAttention(**common, capacity=length, **looking, keys="before", positions="t5")

    layers = setting["layers"]
    return {
        "Transformer-XL": build(*[xl] * layers),
        "Compressive": build(*[compressive] * layers),
        "∞-former": build(*[infinite(False)] * layers),
        "∞-former, sticky": build(*[infinite(True)] * layers),
        "Memorizing": build(*[xl] * setting["layer"], memorizing, *[xl] * (layers - 1 - setting["layer"])),
    }


def answer(model: MemoryTransformer, batch: torch.Tensor, setting: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (rows, tokens, vocabulary) of the answer, and what memory's regularisers ask."""
    memory, read = None, max(batch.shape[1] - setting["segment"], 0)
    heard = read
    for _ in range(setting["layers"] - 1 - setting["layer"]):  # each layer above sees a window before its segment
        heard = max(heard // setting["segment"] * setting["segment"] - setting["window"], 0)
    with torch.no_grad():  # no gradient crosses a segment, and the answer lies in the last
        if heard:  # what was looked up before cannot reach the answer
            with barely_asked(model):
                _, memory = model(batch[:, :heard])
        if heard < read:
            _, memory = model(batch[:, heard:read], memory)
    logits, memory = model(batch[:, read:-1], memory)
    extra = [state.loss for state in memory if getattr(state, "loss", None) is not None]
    return logits[:, -setting["tokens"] :], sum(extra, logits.new_zeros(()))


@contextmanager
def barely_asked(model: MemoryTransformer) -> Iterator[None]:
    """Layers that look up neighbours look up one."""
    layers = [block.attention for block in model.blocks if hasattr(block.attention, "k")]
    asked = [layer.k for layer in layers]
    for layer in layers:
        layer.k = 1
    try:
        yield
    finally:
        for layer, k in zip(layers, asked, strict=True):
            layer.k = k


def train(model: MemoryTransformer, course: list[tuple[int, int, int]], setting: dict[str, Any], device: str) -> Any:
    """Train from length to length on fresh sequences; after each, yield the test.

    Adam moves a number by about its rate a step, so gates, single numbers that have to move by about 1 whenever
    sequences double, have a higher one.
    """
    gates = {name: p for name, p in model.named_parameters() if name.endswith("attention.gate")}
    others = [p for name, p in model.named_parameters() if name not in gates]
    groups = [{"params": others, "of": 1}, {"params": list(gates.values()), "of": setting["gates"]}]
    optimizer = torch.optim.Adam(groups)
    generator, tokens = torch.Generator().manual_seed(0), setting["tokens"]
    taken, steps = 0, sum(steps for _, steps, _ in course)
    for length, more, rows in course:
        begin, losses = time.perf_counter(), []
        for _ in range(more):
            for group in optimizer.param_groups:  # a short rise, then a fall
                group["lr"] = group["of"] * setting["rate"] * min((taken + 1) / 20, (1.05 - taken / steps) ** 0.5)
            batch = sequences(rows, length, tokens, generator).to(device)
            logits, extra = answer(model, batch, setting)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -tokens:].flatten())
            optimizer.zero_grad()
            (loss + extra).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            taken += 1
        recent = losses[-20:]
        spent = {"steps": taken, "seconds": round(time.perf_counter() - begin, 1)}
        yield length, {"accuracy": test(model, length, setting, device), "loss": sum(recent) / len(recent), **spent}


@torch.no_grad()
def test(model: MemoryTransformer, length: int, setting: dict[str, Any], device: str) -> float:
    """Share of the answers' tokens that are right, each given those before it.

    To name any that has not been named yet gives (1 + 1/2 + ... + 1/tokens) / tokens: 0.29 of 10, 0.18 of 20.
    """
    tokens, right, generator = setting["tokens"], [], torch.Generator().manual_seed(1)
    for _ in range(max(setting["test"] // 16, 1)):
        batch = sequences(16, length, tokens, generator).to(device)
        given = answer(model, batch, setting)[0].argmax(-1)
        right.append((given == batch[:, -tokens:]).float().mean().item())
    return sum(right) / len(right)


def show(results: dict[str, dict[str, Any]]) -> None:
    """The table, one row a model."""
    lengths = list(dict.fromkeys(length for by_length in results.values() for length in by_length))
    print(f"{'accuracy':20}" + "".join(f"{n:>8}" for n in lengths))
    for name, by_length in results.items():
        print(f"{name:20}" + "".join(f"{by_length[n]['accuracy']:8.3f}" if n in by_length else "" for n in lengths))


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, by_length in results.items():
        axis.plot(
            [int(n) for n in by_length],
            [r["accuracy"] for r in by_length.values()],
            "o-",
            label=name,
        )
    axis.set_xscale("log", base=2)
    axis.set(xlabel="length of a sequence, tokens", ylabel="answers' tokens that are right")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="a part of the names of the models to train")
    parser.add_argument("--longest", type=int, default=1 << 20, help="leave out longer sequences")
    for name, kind in TRIED.items():
        parser.add_argument(f"--{name}", type=kind, help="in place of the setting's; then nothing is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="models trained at a time: 2 on CPUs, 1 on a GPU by default")
    options = parser.parse_args()
    setting = dict(FULL if options.full else QUICK)
    tried = {name: given for name in TRIED if (given := getattr(options, name)) is not None}
    setting |= tried
    if not 0 <= setting["layer"] < setting["layers"]:
        parser.error(f"--layer is one of the {setting['layers']} layers, from 0")
    shorter = ([part for part in course if part[0] <= options.longest] for course in setting["courses"])
    setting["courses"] = [course for course in shorter if course]
    processes = options.processes or (min(os.cpu_count() or 1, 2) if options.device == "cpu" else 1)
    threads = max(torch.get_num_threads() // processes, 1)
    where = processor() if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    machine = f"{where}, {processes} at a time, {threads} threads each"
    whole = {"machine": machine, "torch": torch.__version__, "seed": options.seed, "setting": setting}
    kept = not (tried or options.only or options.seed or options.longest < 1 << 20)
    os.environ |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "NUMBA", "OPENBLAS")}
    names = [name for name in models(setting, 1) if not options.only or options.only in name]
    results: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        running = {
            pool.submit(led, name, course, setting, options.device, options.seed): name
            for course in setting["courses"]
            for name in reversed(names)  # the one that takes longest first
        }
        for future in as_completed(running):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            by_length = results.get(running[future], {}) | future.result()
            results[running[future]] = dict(sorted(by_length.items(), key=lambda item: int(item[0])))
            results = {name: results[name] for name in names if name in results}
            if kept:
                keep(whole | {"results": results}, "sorting-full" if options.full else "sorting")
    show(results)


def led(
    name: str, course: list[tuple[int, int, int]], setting: dict[str, Any], device: str, seed: int
) -> dict[str, dict[str, Any]]:
    """One model led through a course: its results by length."""
    torch.manual_seed(seed)
    model, results = models(setting, max(length for length, _, _ in course))[name]().to(device), {}
    for length, result in train(model, course, setting, device):
        results[str(length)] = result | {"parameters": sum(p.numel() for p in model.parameters())}
        print(f"{length:6} {name:18} {result}", flush=True)
    return results


def keep(whole: dict[str, Any], name: str) -> None:
    """The table and all settings, and the plot, in results/."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw(whole["results"], RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
