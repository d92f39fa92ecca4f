"""One training step with a kNN memory, without one, and with a memory as one would write it in PyTorch.

Six layers of width 512 (8 heads of 64), one of which has a memory of 65,536 pairs a head, segments of 512, batch 2;
without memory, that layer has its local attention alone. All take turns in one process, so that a noisy machine slows
all alike; shown are the best times, what a memory adds to the step without one, and how much more the plain one adds.

    nox -s bench -- training_step --rounds=3
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from perdure.bindings.torch import KNNState, MemorizingAttention, MemoryTransformer, TransformerXLAttention
from torch import nn

RESULTS = Path(__file__).parent / "results"


class PlainMemory:
    """Rings of tensors, searched by a matrix product and torch.topk."""

    def __init__(self, rows: int, heads: int, dim: int, capacity: int):
        self.keys, self.values = (torch.randn(rows, heads, capacity, dim) for _ in range(2))
        self.keys = nn.functional.normalize(self.keys, dim=-1)
        self.slot = 0

    def retrieve(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        best = torch.topk(queries @ self.keys.mT, k, dim=-1).indices  # (rows, heads, q, k)
        index = best.flatten(2)[..., None].expand(-1, -1, -1, queries.shape[-1])
        return tuple(a.gather(2, index).unflatten(2, best.shape[2:]) for a in (self.keys, self.values))

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = self.slot + keys.shape[2]
        self.keys[:, :, self.slot : end], self.values[:, :, self.slot : end] = keys, values
        self.slot = end % self.keys.shape[2]


class PlainAttention(MemorizingAttention):
    """The same layer over a PlainMemory, or without one, for calls of one segment."""

    plain: PlainMemory | None = None

    def _attend(self, x: torch.Tensor, memory: KNNState, start: Any, present: Any, turning: bool) -> Any:
        queries, keys, values = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        queries, keys = (nn.functional.normalize(a, dim=-1) for a in (queries, keys))
        if self.plain is not None:
            with torch.no_grad():
                near = self.plain.retrieve(queries, self.k)
                self.plain.write(keys, values)
        queries = queries * self.scale[:, None, None]
        n = x.shape[1]
        past = [
            torch.cat([a[:, :, -self.reach :], b], dim=2) for a, b in ((memory.keys, keys), (memory.values, values))
        ]
        causal = torch.ones(n, self.reach + n, dtype=torch.bool).tril(self.reach)
        output = nn.functional.scaled_dot_product_attention(queries, *past, attn_mask=causal, scale=1.0)
        if self.plain is not None:
            weights = torch.softmax((queries[..., None, :] * near[0]).sum(-1), dim=-1)
            read = (weights[..., None] * near[1]).sum(-2)
            g = torch.sigmoid(self.gate)[:, None, None]
            output = g * read + (1 - g) * output
        held = {"keys": keys.detach(), "values": values.detach()}
        kept = {name: torch.cat([getattr(memory, name), a], dim=2)[:, :, a.shape[2] :] for name, a in held.items()}
        return self.output(self._joined(output)), kept


def model(kind: str, options: argparse.Namespace) -> MemoryTransformer:
    common = {"segment": options.segment, "window": options.segment}
    layers: list[Any] = [TransformerXLAttention(512, 8, **common) for _ in range(6)]
    layer = MemorizingAttention if kind == "perdure" else PlainAttention
    layers[4] = layer(512, 8, **common, capacity=options.capacity, k=32, index=options.index)
    return MemoryTransformer(options.vocabulary, layers)


def filled(kind: str, options: argparse.Namespace) -> tuple[MemoryTransformer, Any]:
    """A model and a memory that is full."""
    made = model(kind, options)
    memory = made.memory(options.rows)
    if kind == "perdure":
        full = options.capacity // options.segment * options.segment
        state = memory[4].following(position=torch.full((options.rows,), full))
        keys, values = (torch.randn(options.rows, 8, full, 64) for _ in range(2))
        state.memory.write(nn.functional.normalize(keys, dim=-1), values)
        memory = (*memory[:4], state, *memory[5:])
    elif kind == "plain":
        made.blocks[4].attention.plain = PlainMemory(options.rows, 8, 64, options.capacity)
    return made, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--capacity", type=int, default=65_536)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--index", default="exact")
    options = parser.parse_args()
    torch.manual_seed(0)
    kinds = ("without", "perdure", "plain")
    models = {kind: filled(kind, options) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(options.rounds + 1):
        tokens = torch.randint(options.vocabulary, (options.rows, options.segment + 1))
        for kind in kinds:
            made, memory = models[kind]
            begin = time.perf_counter()
            logits, memory = made(tokens[:, :-1], memory)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            made.zero_grad()
            loss.backward()
            if turn:  # the first compiles
                times[kind].append(time.perf_counter() - begin)
            models[kind] = made, memory
    best = {kind: min(seconds) for kind, seconds in times.items()}
    for kind in kinds:
        added = best[kind] / best["without"] - 1
        print(f"{kind:8} {1000 * best[kind]:8.0f} ms a step  {100 * added:+6.0f} %")
    parts = [best[kind] - best["without"] for kind in ("plain", "perdure")]
    print(f"the plain memory adds {parts[0] / parts[1]:.1f} times what perdure's adds")
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    setting = dict(vars(options))
    kept = {"machine": machine, "setting": setting, "best ms": {kind: round(1000 * best[kind]) for kind in kinds}}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training_step.json").write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
