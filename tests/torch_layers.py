"""The layers under test, small, in float64, and what the tests do with them."""

import torch
from perdure.bindings.torch import (
    CompressiveAttention,
    ContinuousAttention,
    MemorizingAttention,
    TransformerXLAttention,
)

DIM, HEADS, SEGMENT = 12, 2, 6

BUILD = {
    "memorizing": lambda: MemorizingAttention(DIM, HEADS, capacity=20, k=3, segment=SEGMENT, dtype="float64"),
    "memorizing, cache": lambda: MemorizingAttention(
        DIM, HEADS, capacity=20, k=3, segment=SEGMENT, window=4, overlap=False, positions="rope", dtype="float64"
    ),
    "memorizing, joint": lambda: MemorizingAttention(
        DIM, HEADS, capacity=7, k=9, segment=SEGMENT, combine="joint", positions="t5", normalize=False, dtype="float64"
    ),
    "memorizing, zeros": lambda: MemorizingAttention(
        DIM, HEADS, capacity=20, k=3, segment=SEGMENT, nothing="zeros", bias=True, dtype="float64"
    ),
    "memorizing, grouped": lambda: MemorizingAttention(
        DIM, HEADS, capacity=20, k=3, segment=SEGMENT, window=3, kv_heads=1, positions="t5", dtype="float64"
    ),
    "memorizing, before": lambda: MemorizingAttention(
        DIM, HEADS, capacity=20, k=3, segment=SEGMENT, window=3, keys="before", projections="equal", dtype="float64"
    ),
    "transformer-xl": lambda: TransformerXLAttention(DIM, HEADS, segment=SEGMENT, window=8),
    "compressive": lambda: CompressiveAttention(DIM, HEADS, segment=SEGMENT, window=SEGMENT, compressed=5, rate=2),
    "compressive, used": lambda: CompressiveAttention(
        DIM, HEADS, segment=SEGMENT, window=SEGMENT, compressed=4, rate=3, method="most_used"
    ),
    "compressive, dilated": lambda: CompressiveAttention(
        DIM, HEADS, segment=SEGMENT, window=9, compressed=4, rate=3, method="dilated"
    ),
    "continuous": lambda: ContinuousAttention(DIM, HEADS, segment=SEGMENT, basis=16, samples=12),
    "continuous, gated": lambda: ContinuousAttention(
        DIM, HEADS, segment=SEGMENT, window=3, basis=16, samples=12, sticky=False, density="sparsemax", gated=True
    ),
    "continuous, moments": lambda: ContinuousAttention(
        DIM, HEADS, segment=SEGMENT, basis=16, samples=12, affine=False, compat="infinite-former", ridge=0.5
    ),
}


def build(name):
    """The layer called `name`, its parameters drawn, none of them at a value that hides a mistake."""
    torch.manual_seed(0)
    layer = BUILD[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def tokens(rows, n, seed=1):
    """Input (rows, n, DIM)."""
    return torch.randn(rows, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(layer, x, cuts=(), memory=None, **extra):
    """Output of x in calls that end at `cuts`, and the memory after the last; `extra` masks are cut with x."""
    outputs, first = [], 0
    for last in [*cuts, x.shape[1]]:
        masks = {name: mask[:, first:last] for name, mask in extra.items()}
        output, memory = layer(x[:, first:last], memory, **masks)
        outputs.append(output)
        first = last
    return torch.cat(outputs, dim=1), memory
