"""The register tile over codes: bounds on the scores of a few keys and a few queries.

The shape of the loop is that of tile.py, but a step takes a word of four components. With AVX-512 VNNI that is one
instruction. With AVX2 unsigned bytes are multiplied by signed ones and pairs added to 16 bits, in which the sums then
go on for a whole chunk (codes.py says why they fit); one multiplication by ones adds pairs of them to 32 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from . import machine
from .codes import CHUNK, HALVES, PACKED
from .tile import FILLED, Sums, Tile, word
from .vectors import BIT, INDEX, SHORT, Vectors, index

BYTE, HALF = ir.IntType(8), ir.IntType(16)
ONE = (min(4, 64 * 4 // (FILLED * machine.register_bytes())), 1)
FEW = (2, 3) if machine.dots() else (2, 2)
MANY = (2 if machine.dots() else 1, 6)


def make_code_tile(panels: int, queries: int) -> Callable[..., int]:
    """The function tile(codes, scale, error, size, panel, asked, starts, reach, ratio, group, bounds, low, high, hits).

    The score of a key and a query, in units of the query's scale, lies in middle ± band, where
    middle = scale·(Σ codes·asked + starts) and band = reach·(error + ratio·size), with one `ratio` a group. The tile
    goes from `group` on to the first with a middle + band above its query's bound and returns it, with all ends in
    `low` and `high` (queries x panels x lanes) and in hits[j] one bit for each key whose upper end is above; or the
    number of groups. It may stop at a group whose ends, rounded another way, are just not above.
    """
    if config.DISABLE_JIT:
        return plain_code_tile(panels, queries)

    @intrinsic
    def tile(typing, codes, scale, error, size, panel, asked, starts, reach, ratio, group, bounds, low, high, hits):
        given = (
            codes,
            scale,
            error,
            size,
            types.int64,
            asked,
            starts,
            reach,
            ratio,
            types.int64,
            bounds,
            low,
            high,
            hits,
        )

        def generate(context, builder, signature, args):
            return CodeTile(context, builder, signature, args, (panels, queries)).result()

        return types.int64(*given), generate

    return tile


def make_highest(panels: int, queries: int) -> Callable[..., None]:
    """The function highest(codes, scale, error, size, panel, asked, starts, reach, ratio, maxima).

    It raises maxima (queries of all groups, panels x lanes), whose rows may stand apart, to the lower ends.
    """
    if config.DISABLE_JIT:
        return plain_highest(panels, queries)

    @intrinsic
    def highest(typing, codes, scale, error, size, panel, asked, starts, reach, ratio, maxima):
        given = (codes, scale, error, size, types.int64, asked, starts, reach, ratio, maxima)

        def generate(context, builder, signature, args):
            Highest(context, builder, signature, args, (panels, queries)).result()
            return context.get_dummy_value()

        return types.void(*given), generate

    return highest


class CodeTile(Tile):
    """Writes the code of one tile; its loop runs over words."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any, shape: tuple[int, int]):
        self.arrays: list[Any] = [
            context.make_array(kind)(context, builder, arg) if isinstance(kind, types.Array) else None
            for kind, arg in zip(signature.args, args, strict=True)
        ]
        self.builder, (self.panels, self.queries) = builder, shape
        width = machine.register_bytes() // 4
        self.lanes = FILLED * width
        self.words, self.vectors = Vectors(builder, SHORT, width), Vectors(builder, ir.FloatType(), width)
        codes, *numbers, _, asked, starts, self.reach, self.ratio = self.arrays[:9]
        self.groups, self.d = (builder.extract_value(asked.shape, axis) for axis in range(2))
        self.keys_at = self.panel_pointers(builder.bitcast(codes.data, SHORT.as_pointer()), args[4])
        self.queries_at = builder.bitcast(asked.data, SHORT.as_pointer())
        self.scale, self.error, self.size = (self.key_scales(array.data, args[4]) for array in numbers)
        self.starts_at, self.chunks = starts.data, builder.extract_value(starts.shape, 1)
        self.reach, self.ratio = self.reach.data, self.ratio.data
        self.given(args)

    def given(self, args: Any) -> None:
        """What else the tile is called with."""
        self.group = args[9]
        self.bounds, self.low, self.high, self.hits = (array.data for array in self.arrays[10:])

    def chains(self) -> Sums:
        """The sums over all words, one chunk of them after another; as a rule there is only one."""
        b, words = self.builder, self.words
        self.chunk, last = index(0), self.end_of_chunk(index(0))
        first_sums = self.widened(self.loop(index(0), last))
        before, more, done = b.block, b.append_basic_block("chunk"), b.append_basic_block("summed")
        b.cbranch(b.icmp_signed("<", last, self.d), more, done)
        b.position_at_end(more)
        self.chunk, first, so_far = b.phi(INDEX), b.phi(INDEX), {at: b.phi(words.type) for at in first_sums}
        following = self.end_of_chunk(first)
        totals = {at: b.add(so_far[at], more) for at, more in self.widened(self.loop(first, following)).items()}
        now = [(self.chunk, index(1), b.add(self.chunk, index(1))), (first, last, following)]
        for phi, at_first, then in now + [(so_far[at], first_sums[at], totals[at]) for at in totals]:
            phi.add_incoming(at_first, before)
            phi.add_incoming(then, b.block)
        b.cbranch(b.icmp_signed("<", following, self.d), more, done)
        after = b.block
        b.position_at_end(done)
        result = {at: b.phi(words.type) for at in totals}
        for at, phi in result.items():
            phi.add_incoming(first_sums[at], before)
            phi.add_incoming(totals[at], after)
        return result

    def end_of_chunk(self, first: Any) -> Any:
        last = self.builder.add(first, index(CHUNK))
        return self.builder.select(self.builder.icmp_signed("<", last, self.d), last, self.d)

    def start(self, j: int) -> Any:
        """What a chunk's sums of query j start from: minus what the keys' offset adds to them."""
        b, words = self.builder, self.words
        query = b.mul(b.add(self.first_query, index(j)), self.chunks)
        return words.spread(b.load(words.at(self.starts_at, query, self.chunk)))

    def step(self, c: Any, before: Sums) -> Sums:
        b, words = self.builder, self.words
        row, spot = b.mul(c, index(self.lanes)), b.mul(c, index(self.queries))
        keys = {(p, r): words.load(words.at(self.keys_at[p], row, index(r * words.width))) for p, r in self.places()}
        after = {}
        for j in range(self.queries):
            query = words.spread(b.load(words.at(self.query_at, spot, index(j))))
            for place, key in keys.items():
                after[*place, j] = self.add_products(key, query, before[*place, j])
        return after

    def add_products(self, key: Any, query: Any, total: Any) -> Any:
        """total + Σ key·query over the four bytes of every word: one sum of 32 bits, or two of 16."""
        b, words, width = self.builder, self.words, self.words.width
        if HALVES == 1:
            return self.call("llvm.x86.avx512.vpdpbusd.512", words.type, total, key, query)
        quarters, halves = ir.VectorType(BYTE, 4 * width), ir.VectorType(HALF, 2 * width)
        products = self.call("llvm.x86.avx2.pmadd.ub.sw", halves, b.bitcast(key, quarters), b.bitcast(query, quarters))
        return b.bitcast(b.add(products, b.bitcast(total, halves)), words.type)

    def widened(self, sums: Sums) -> Sums:
        """The sums of a chunk in 32 bits."""
        if HALVES == 1:
            return sums
        halves = ir.VectorType(HALF, 2 * self.words.width)
        ones = ir.Constant(halves, [1] * 2 * self.words.width)
        add_pairs = functools.partial(self.call, "llvm.x86.avx2.pmadd.wd", self.words.type, ones)
        return {at: add_pairs(self.builder.bitcast(total, halves)) for at, total in sums.items()}

    def call(self, name: str, result: ir.Type, *args: Any) -> Any:
        module = self.builder.module
        kind = ir.FunctionType(result, [a.type for a in args])
        return self.builder.call(module.globals.get(name) or ir.Function(module, kind, name), args)

    def compared(self) -> tuple[Sums, Any]:
        """The sums, and a vector that is true somewhere if any upper end reaches its query's bound.

        Upper ends are not kept, so that all sums stay in registers. What counts is the sign of the gap to the bound,
        the highest bit, and no gap may be positive: so these bits are enough. (Of infinities the bound's wins.)
        """
        b, vectors, sums = self.builder, self.vectors, self.measured()
        gaps = []
        for j in range(self.queries):
            reach, bound = self.of_query(self.reach, j), b.fneg(self.of_query(self.bounds, j))
            for place in self.places():
                missing = vectors.fma(reach, self.errors[place], bound)
                gaps.append(b.bitcast(vectors.fma(sums[*place, j], self.scale[place], missing), self.words.type))
        none = ir.Constant(self.words.type, [0] * vectors.width)
        return sums, b.icmp_signed(">=", functools.reduce(b.and_, gaps), none)

    def measured(self) -> Sums:
        """The sums; and their keys' errors, as far as these do not depend on the query, in `errors`."""
        vectors, sums = self.vectors, self.chains()
        ratio = vectors.spread(self.builder.load(vectors.at(self.ratio, self.now)))
        self.errors = {place: vectors.fma(ratio, self.size[place], self.error[place]) for place in self.places()}
        return {at: self.builder.sitofp(total, vectors.type) for at, total in sums.items()}

    def store_hits(self, j: int, sums: Sums) -> None:
        """Both ends of all scores of query j, and the word of its hits."""
        b, above = self.builder, {}
        reach, bound = self.of_query(self.reach, j), self.of_query(self.bounds, j)
        for p, r in self.places():
            middle, band = b.fmul(sums[p, r, j], self.scale[p, r]), b.fmul(reach, self.errors[p, r])
            high = b.fadd(middle, band)
            self.store_lanes(self.low, b.fsub(middle, band), p, r, j)
            self.store_lanes(self.high, high, p, r, j)
            above[p, r] = self.exceeds(high, bound)
        self.store_word(above, j)


class Highest(CodeTile):
    """Writes the code of one tile that never stops, and only raises maxima."""

    def given(self, args: Any) -> None:
        self.group, self.maxima = index(0), self.arrays[9]

    def compared(self) -> tuple[Sums, Any]:
        """The sums, whose lower ends went into the maxima, and that there is nothing to stop for."""
        b, vectors, sums = self.builder, self.vectors, self.measured()
        apart = b.sdiv(b.extract_value(self.maxima.strides, 0), index(4))
        for j in range(self.queries):
            reach, row = self.of_query(self.reach, j), b.mul(b.add(self.first_query, index(j)), apart)
            for p, r in self.places():
                band = b.fmul(reach, self.errors[p, r])
                low = vectors.fma(sums[p, r, j], self.scale[p, r], b.fneg(band))
                place = vectors.at(self.maxima.data, row, index(p * self.lanes + r * vectors.width))
                most = vectors.load(place)
                vectors.store(b.select(b.fcmp_ordered(">", low, most), low, most), place)
        return sums, ir.Constant(ir.VectorType(BIT, vectors.width), [0] * vectors.width)

    def store_hits(self, j: int, sums: Sums) -> None:
        """There are none."""


def plain_code_tile(panels: int, queries: int) -> Callable[..., int]:
    """The same function in NumPy."""

    def tile(codes, scale, error, size, panel, asked, starts, reach, ratio, group, bounds, low, high, hits):
        some, words = slice(panel, panel + panels), codes.shape[1]
        keys = codes[some].reshape(panels, words, -1, HALVES, PACKED // HALVES).astype(np.int64)
        for g in range(group, len(asked)):
            for j in range(queries):
                i, query = g * queries + j, asked[g].reshape(words, queries, HALVES, -1)[:, j].astype(np.int64)
                total = np.zeros(keys.shape[::2][:2], np.int64)  # (panels, lanes)
                for chunk in range(starts.shape[1]):
                    part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                    start = starts[i, chunk : chunk + 1].view(f"int{32 // HALVES}")
                    sums = np.einsum("pwlhb,whb->plh", keys[:, part], query[part]) + start
                    total += np.sum(sums.astype(start.dtype), axis=-1)
                total, places = total.astype(np.float32), slice(j * total.size, (j + 1) * total.size)
                band = reach[i] * (error[some] + ratio[g] * size[some])
                low[places], high[places] = (total * scale[some] - band).ravel(), (total * scale[some] + band).ravel()
                hits[j] = word(high[places] > bounds[i])
            if hits.any():
                return g
        return len(asked)

    return tile


def plain_highest(panels: int, queries: int) -> Callable[..., None]:
    """The same function in NumPy."""
    tile = plain_code_tile(panels, queries)

    def highest(codes, scale, error, size, panel, asked, starts, reach, ratio, maxima):
        span, bounds = maxima.shape[1], np.full(len(reach), -np.inf, np.float32)
        low, high = np.empty((2, queries * span), np.float32)
        hits = np.empty(queries, np.int64)
        for group in range(len(asked)):
            tile(codes, scale, error, size, panel, asked, starts, reach, ratio, group, bounds, low, high, hits)
            some = maxima[group * queries : (group + 1) * queries]
            np.maximum(some, low.reshape(some.shape), out=some)

    return highest
