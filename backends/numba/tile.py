"""The register tile: scores of a few keys and a few queries, computed without leaving the registers.

A score is one chain of multiply-adds over the components in their order, each rounded once:

    ip:  s <- q[c]·k[c] + s             l2:  s <- s - (q[c] - k[c])²

so its bits depend on its query and key alone, not on the batch, the shard or the order it is computed in.

Keys stand in panels, one lane a key (panels.py); queries in groups (d, queries). A tile scores some panels against one
group, holding every sum in a register. Each step of its loop over d loads one component of each key, spreads one
component of each query over a register, and adds the products. It is written in LLVM's own vectors, which become
whatever registers there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic

from . import machine
from .vectors import INDEX, Vectors, compiled_highest_bit, index, plain_highest_bit

FILLED = 2  # registers that the lanes of a panel fill
Sums = dict[tuple[int, int, int], Any]  # (panel, register, query) -> vector


def lanes(dtype: Any) -> int:
    """Keys in a panel whose scores are computed in `dtype`."""
    return FILLED * machine.register_bytes() // np.dtype(dtype).itemsize


ONE = (min(4, 64 // lanes(np.float32)), 1)  # (panels, queries) for a single query: the keys' memory is the limit, ...
FEW = (2, 3)
MANY = (2 if machine.registers() == 32 else 1, 6)  # ... for many the arithmetic: as many sums as there are registers


def panel_counts(one: tuple[int, int], few: tuple[int, int], many: tuple[int, int]) -> Callable[[int], int]:
    """The function panels_a_tile(queries): how many panels the tile of these three that takes so many queries takes."""

    @njit(cache=True, nogil=True)
    def panels_a_tile(queries):
        if queries == one[1]:
            return one[0]
        return few[0] if queries == few[1] else many[0]

    return panels_a_tile


def make_tile(panels: int, queries: int, l2: bool) -> Callable[..., int]:
    """The function tile(keys, scales, panel, grouped, group, bounds, scores, hits) for that many panels and queries.

    It scores keys[panel : panel + panels], (·, d, lanes), against grouped[group], (d, queries), and the groups after
    it, until a score exceeds its query's bound (bounds[group x queries + j]). It returns that group, with all its
    scores in `scores` (queries x panels x lanes) and in hits[j] a word with one bit for each score above the bound; or
    the number of groups, where no score exceeds any bound.
    """
    if config.DISABLE_JIT:
        return plain_tile(panels, queries, l2)

    @intrinsic
    def tile(typing, keys, scales, panel, grouped, group, bounds, scores, hits):
        signature = types.int64(keys, scales, types.int64, grouped, types.int64, bounds, scores, hits)

        def generate(context, builder, signature, args):
            return Tile(context, builder, signature, args, (panels, queries), l2).result()

        return signature, generate

    return tile


class Tile:
    """Writes the code of one tile."""

    def __init__(
        self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any, shape: tuple[int, int], l2: bool
    ):
        def data(i: int) -> Any:
            return context.make_array(signature.args[i])(context, builder, args[i]).data

        keys, _, _, grouped, *_ = signature.args
        self.builder, (self.panels, self.queries), self.l2 = builder, shape, l2
        self.stored, element = keys.dtype, context.get_data_type(grouped.dtype)
        self.stored_element = context.get_data_type(self.stored)
        self.lanes = FILLED * machine.register_bytes() * 8 // grouped.dtype.bitwidth
        self.vectors = Vectors(builder, element, self.lanes // FILLED)
        self.bounds, self.scores, self.hits = data(5), data(6), data(7)
        self.group, shape = args[4], context.make_array(grouped)(context, builder, args[3]).shape
        self.groups, self.d = builder.extract_value(shape, 0), builder.extract_value(shape, 1)
        self.keys_at, self.queries_at = self.panel_pointers(data(0), args[2]), data(3)
        self.scale: Any = self.key_scales(data(1), args[2]) if self.stored == types.int8 else None

    def places(self) -> Iterator[tuple[int, int]]:
        """Every (panel, register of its lanes)."""
        return ((p, r) for p in range(self.panels) for r in range(FILLED))

    def sums(self) -> Iterator[tuple[int, int, int]]:
        return ((p, r, j) for p, r in self.places() for j in range(self.queries))

    def panel_pointers(self, data: Any, panel: Any) -> list[Any]:
        size = self.builder.mul(self.d, index(self.lanes))
        pointers = [self.vectors.at(data, self.builder.mul(panel, size))]
        while len(pointers) < self.panels:
            pointers.append(self.vectors.at(pointers[-1], size))
        return pointers

    def key_scales(self, data: Any, panel: Any) -> dict[tuple[int, int], Any]:
        first = self.builder.mul(panel, index(self.lanes))
        return {
            (p, r): self.vectors.load(self.vectors.at(data, first, index((p * FILLED + r) * self.vectors.width)))
            for p, r in self.places()
        }

    def key(self, p: int, r: int, row: Any) -> Any:
        """One component of the keys in register r of panel p, widened to the computing type."""
        b, vectors = self.builder, self.vectors
        raw = vectors.load(vectors.at(self.keys_at[p], row, index(r * vectors.width)), self.stored_element)
        if self.stored == types.int8:
            whole = b.sitofp(raw, vectors.type)
            return b.fmul(whole, self.scale[p, r]) if self.l2 else whole
        if self.stored == types.int16:  # the bits of float16
            return b.fpext(b.bitcast(raw, ir.VectorType(ir.HalfType(), vectors.width)), vectors.type)
        if self.stored == types.uint16:  # the bits of bfloat16: the upper half of float32's
            wide = ir.VectorType(ir.IntType(32), vectors.width)
            return b.bitcast(b.shl(b.zext(raw, wide), ir.Constant(wide, [16] * vectors.width)), vectors.type)
        return raw

    def step(self, c: Any, before: Sums) -> Sums:
        """The sums with component c added; all keys are loaded first, so that one query at a time needs a register."""
        b, vectors = self.builder, self.vectors
        row, spot = b.mul(c, index(self.lanes)), b.mul(c, index(self.queries))
        keys = {place: self.key(*place, row) for place in self.places()}
        after = {}
        for j in range(self.queries):
            query = vectors.spread(b.load(vectors.at(self.query_at, spot, index(j))))
            for place, key in keys.items():
                if self.l2:
                    gap = b.fsub(query, key)
                    after[*place, j] = vectors.fma(b.fneg(gap), gap, before[*place, j])
                else:
                    after[*place, j] = vectors.fma(query, key, before[*place, j])
        return after

    def chains(self) -> Sums:
        """The sums over all d components."""
        return self.loop(index(0), self.d)

    def loop(self, first: Any, last: Any) -> Sums:
        """The sums after the steps first <= c < last."""
        b = self.builder
        starts = [self.start(j) for j in range(self.queries)]
        before, body, done = b.block, b.append_basic_block("component"), b.append_basic_block("scored")
        b.cbranch(b.icmp_signed("<", first, last), body, done)
        b.position_at_end(body)
        c, sums = b.phi(INDEX), {(p, r, j): b.phi(starts[j].type) for p, r, j in self.sums()}
        after = self.step(c, sums)
        following = b.add(c, index(1))
        b.cbranch(b.icmp_signed("<", following, last), body, done)
        c.add_incoming(first, before)
        c.add_incoming(following, body)
        b.position_at_end(done)
        result = {(p, r, j): b.phi(starts[j].type) for p, r, j in self.sums()}
        for at in self.sums():
            for phi in (sums[at], result[at]):
                phi.add_incoming(starts[at[2]], before)
                phi.add_incoming(after[at], body)
        return result

    def start(self, j: int) -> Any:
        """What the sums of query j start from."""
        return ir.Constant(self.vectors.type, [0.0] * self.vectors.width)

    def result(self) -> Any:
        """Code for one group after another, until one has a hit."""
        b, before = self.builder, self.builder.block
        some, following, hit, end = (b.append_basic_block(name) for name in ("group", "following", "hit", "end"))
        b.cbranch(b.icmp_signed("<", self.group, self.groups), some, end)
        b.position_at_end(some)
        group = self.now = b.phi(INDEX)
        self.first_query = b.mul(group, index(self.queries))
        self.query_at = self.vectors.at(self.queries_at, b.mul(self.first_query, self.d))
        scores, flags = self.compared()
        found = b.icmp_unsigned("!=", self.vectors.bits(flags), ir.Constant(ir.IntType(self.vectors.width), 0))
        b.cbranch(found, hit, following).set_weights([1, 99])
        b.position_at_end(following)
        advanced = b.add(group, index(1))
        group.add_incoming(self.group, before)
        group.add_incoming(advanced, following)
        b.cbranch(b.icmp_signed("<", advanced, self.groups), some, end)
        b.position_at_end(hit)
        for j in range(self.queries):
            self.store_hits(j, scores)
        b.branch(end)
        b.position_at_end(end)
        reached = b.phi(INDEX)
        for value, block in ((self.groups, before), (self.groups, following), (group, hit)):
            reached.add_incoming(value, block)
        return reached

    def compared(self) -> tuple[Sums, Any]:
        """The scores, and a vector that is true somewhere if any of them exceeds its query's bound."""
        b, scores = self.builder, self.chains()
        if self.scale is not None and not self.l2:
            scores = {(p, r, j): b.fmul(total, self.scale[p, r]) for (p, r, j), total in scores.items()}
        bounds = [self.of_query(self.bounds, j) for j in range(self.queries)]
        return scores, functools.reduce(b.or_, (self.exceeds(score, bounds[at[2]]) for at, score in scores.items()))

    def of_query(self, data: Any, j: int) -> Any:
        """The number that `data` has for query j, in every lane."""
        return self.vectors.spread(self.builder.load(self.vectors.at(data, self.first_query, index(j))))

    def exceeds(self, score: Any, bound: Any) -> Any:
        return self.builder.fcmp_ordered(">", score, bound)

    def store_hits(self, j: int, scores: Sums) -> None:
        """All scores of query j, and the word of its hits."""
        bound = self.of_query(self.bounds, j)
        above = {}
        for p, r in self.places():
            above[p, r] = self.exceeds(scores[p, r, j], bound)
            self.store_lanes(self.scores, scores[p, r, j], p, r, j)
        self.store_word(above, j)

    def store_lanes(self, array: Any, lanes: Any, p: int, r: int, j: int) -> None:
        first = (j * self.panels + p) * self.lanes + r * self.vectors.width
        self.vectors.store(lanes, self.vectors.at(array, index(first)))

    def store_word(self, above: dict[tuple[int, int], Any], j: int) -> None:
        """One bit for every lane of query j that is `above`."""
        b, word = self.builder, index(0)
        for (p, r), flags in above.items():
            lane = p * self.lanes + r * self.vectors.width
            word = b.or_(word, b.shl(b.zext(self.vectors.bits(flags), INDEX), index(lane)))
        b.store(word, self.vectors.at(self.hits, index(j)))


def plain_tile(panels: int, queries: int, l2: bool) -> Callable[..., int]:
    """The same function in NumPy: what the compiled one is held against, and what runs without a compiler."""

    def tile(keys, scales, panel, grouped, group, bounds, scores, hits):
        some = widened(keys[panel : panel + panels], grouped.dtype).transpose(1, 0, 2)  # (d, panels, lanes)
        scale = scales.reshape(-1, keys.shape[2])[panel : panel + panels] if keys.dtype == np.int8 else None
        if scale is not None and l2:
            some = some * scale
        for g in range(group, len(grouped)):
            for j in range(queries):
                total = np.zeros(some.shape[1:], grouped.dtype)
                for key, query in zip(some, grouped[g, :, j], strict=True):
                    gap = query - key
                    total = fused(-gap, gap, total) if l2 else fused(query, key, total)
                total = (total if scale is None or l2 else total * scale).ravel()
                scores[j * total.size : (j + 1) * total.size] = total
                hits[j] = word(total > bounds[g * queries + j])
            if hits.any():
                return g
        return len(grouped)

    return tile


def word(flags: np.ndarray) -> int:
    """A vector of true and false as the bits of one whole number."""
    return int(np.uint64(sum(1 << int(lane) for lane in np.flatnonzero(flags))).astype(np.int64))


def widened(raw: np.ndarray, dtype: Any) -> np.ndarray:
    """Stored numbers in the computing dtype: int16 holds the bits of float16, uint16 those of bfloat16."""
    if raw.dtype == np.int16:
        return raw.view(np.float16).astype(dtype)
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(dtype)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a·b + c of float32 numbers, rounded once where the CPU does so; of float64 numbers, twice.

    The product is exact in float64. Their sum is rounded to odd, which keeps it on its side of every tie of float32
    (Boldo & Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    c = np.asarray(c)
    if c.dtype == np.float64 or not machine.fuses():
        return a * b + c
    product, addend = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    shifted = total - product
    lost = (product - (total - shifted)) + (addend - shifted)  # two-sum: total + lost is exact
    toward = np.where(lost > 0, np.inf, -np.inf)
    even = (total.view(np.int64) & 1) == 0
    return np.where((lost != 0) & even, np.nextafter(total, toward), total).astype(np.float32)


highest_bit = plain_highest_bit if config.DISABLE_JIT else compiled_highest_bit
