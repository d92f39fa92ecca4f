"""The register tile over codes: bounds on the scores of a few keys and a few queries.

The shape of the loop is that of tile.py, but a step takes TOGETHER words of four components. With AVX-512 VNNI that is
one instruction. On AVX2 two words are multiplied, unsigned by signed bytes, pairs added to 16 bits (127·63·2 fits, even
twice); the two are added there, and then one multiplication by ones adds pairs to 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from . import machine
from .codes import PACKED, TOGETHER
from .tile import FILLED, Sums, Tile, word
from .vectors import SHORT, Vectors, index

BYTE, HALF = ir.IntType(8), ir.IntType(16)
ONE = (min(4, 64 * 4 // (FILLED * machine.register_bytes())), 1)
FEW = (2, 3) if machine.dots() else (2, 2)
MANY = (2, 6) if machine.dots() else (1, 4)


def make_code_tile(panels: int, queries: int) -> Callable[..., int]:
    """The function tile(codes, scale, error, size, panel, asked, sums, reach, slip, group, bounds, low, high, hits).

    The score of a key and a query, in units of the query's scale, lies in middle ± band, where
    middle = scale·(Σ codes·asked - sums) and band = reach·error + slip·size. The tile goes from `group` on to the first
    with a middle + band above its query's bound and returns it, with all ends in `low` and `high` (queries x panels x
    lanes) and in hits[j] one bit for each key whose upper end is above; or the number of groups.
    """
    if config.DISABLE_JIT:
        return plain_code_tile(panels, queries)

    @intrinsic
    def tile(typing, codes, scale, error, size, panel, asked, sums, reach, slip, group, bounds, low, high, hits):
        given = (codes, scale, error, size, types.int64, asked, sums, reach, slip, types.int64, bounds, low, high, hits)

        def generate(context, builder, signature, args):
            return CodeTile(context, builder, signature, args, (panels, queries)).result()

        return types.int64(*given), generate

    return tile


class CodeTile(Tile):
    """Writes the code of one tile; its loop runs over words."""

    stride = TOGETHER

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any, shape: tuple[int, int]):
        def data(i: int) -> Any:
            return context.make_array(signature.args[i])(context, builder, args[i]).data

        self.builder, (self.panels, self.queries) = builder, shape
        width = machine.register_bytes() // 4
        self.lanes = FILLED * width
        self.words, self.vectors = Vectors(builder, SHORT, width), Vectors(builder, ir.FloatType(), width)
        self.group, shape = args[9], context.make_array(signature.args[5])(context, builder, args[5]).shape
        self.groups, self.d = builder.extract_value(shape, 0), builder.extract_value(shape, 1)
        as_words = SHORT.as_pointer()
        self.keys_at = self.panel_pointers(builder.bitcast(data(0), as_words), args[4])
        self.queries_at = builder.bitcast(data(5), as_words)
        self.scale, self.error, self.size = (self.key_scales(data(i), args[4]) for i in (1, 2, 3))
        self.sums_at, self.reach, self.slip, self.bounds = data(6), data(7), data(8), data(10)
        self.low, self.high, self.hits = data(11), data(12), data(13)

    def step(self, c: Any, before: Sums) -> Sums:
        b, words = self.builder, self.words
        rows = [b.mul(b.add(c, index(t)), index(self.lanes)) for t in range(TOGETHER)]
        spots = [b.mul(b.add(c, index(t)), index(self.queries)) for t in range(TOGETHER)]
        keys = {
            (p, r): [words.load(words.at(self.keys_at[p], row, index(r * words.width))) for row in rows]
            for p, r in self.places()
        }
        after = {}
        for j in range(self.queries):
            query = [words.spread(b.load(words.at(self.query_at, spot, index(j)))) for spot in spots]
            for place, key in keys.items():
                after[*place, j] = self.add_products(key, query, before[*place, j])
        return after

    def add_products(self, key: list[Any], query: list[Any], total: Any) -> Any:
        """total + Σ key·query over the four bytes of every word of a step."""
        b, words, width = self.builder, self.words, self.words.width
        if machine.dots():
            return self.call("llvm.x86.avx512.vpdpbusd.512", words.type, total, key[0], query[0])
        quarters, halves = ir.VectorType(BYTE, 4 * width), ir.VectorType(HALF, 2 * width)
        first, second = (
            self.call("llvm.x86.avx2.pmadd.ub.sw", halves, b.bitcast(k, quarters), b.bitcast(q, quarters))
            for k, q in zip(key, query, strict=True)
        )
        ones = ir.Constant(halves, [1] * 2 * width)
        return b.add(total, self.call("llvm.x86.avx2.pmadd.wd", words.type, b.add(first, second), ones))

    def call(self, name: str, result: ir.Type, *args: Any) -> Any:
        module = self.builder.module
        kind = ir.FunctionType(result, [a.type for a in args])
        return self.builder.call(module.globals.get(name) or ir.Function(module, kind, name), args)

    def start(self, j: int) -> Any:
        """What the sums of query j start from: minus what the keys' offset adds to them."""
        total = self.builder.load(self.words.at(self.sums_at, self.first_query, index(j)))
        return self.words.spread(self.builder.neg(total))

    def compared(self) -> tuple[Sums, list[tuple[Any, Sums]]]:
        b, vectors, sums = self.builder, self.vectors, self.chains()
        low, high, above = {}, {}, {}
        for j in range(self.queries):
            reach, slip, bound = (
                vectors.spread(b.load(vectors.at(data, self.first_query, index(j))))
                for data in (self.reach, self.slip, self.bounds)
            )
            for p, r in self.places():
                band = vectors.fma(slip, self.size[p, r], b.fmul(reach, self.error[p, r]))
                middle = b.fmul(b.sitofp(sums[p, r, j], vectors.type), self.scale[p, r])
                low[p, r, j], high[p, r, j] = b.fsub(middle, band), b.fadd(middle, band)
                above[p, r, j] = b.fcmp_ordered(">", high[p, r, j], bound)
        return above, [(self.low, low), (self.high, high)]


def plain_code_tile(panels: int, queries: int) -> Callable[..., int]:
    """The same function in NumPy."""

    def tile(codes, scale, error, size, panel, asked, sums, reach, slip, group, bounds, low, high, hits):
        some = slice(panel, panel + panels)
        keys = codes[some].astype(np.int64).reshape(panels, codes.shape[1], -1, PACKED)  # (panels, words, lanes, 4)
        for g in range(group, len(asked)):
            for j in range(queries):
                i, query = g * queries + j, asked[g].reshape(codes.shape[1], queries, PACKED)[:, j]
                total = (np.einsum("pwlc,wc->pl", keys, query.astype(np.int64)) - sums[i]).astype(np.float32)
                band = reach[i] * error[some] + slip[i] * size[some]
                places = slice(j * total.size, (j + 1) * total.size)
                low[places], high[places] = (total * scale[some] - band).ravel(), (total * scale[some] + band).ravel()
                hits[j] = word(high[places] > bounds[i])
            if hits.any():
                return g
        return len(asked)

    return tile
