"""Scores of keys wherever they stand: the chains of tile.py for a few keys that are not neighbours.

Eight rows of eight components are loaded as they are and transposed in registers, so that a lane is a key as in the
tile; then the chain goes on by eight components. Two such groups run side by side, each hiding the other's latency.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from .tile import fused
from .vectors import SHORT, Vectors, index

LANES, GROUPS = 8, 2
TOGETHER = LANES * GROUPS  # keys scored at once
# what three rounds of shuffles take from two registers: neighbours, pairs, halves
ROUNDS = (
    (1, [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
    (2, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
    (4, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
)


@intrinsic
def compiled_chains(typing, keys, rows, query, scores):
    """Put q·k into scores (TOGETHER,) for the keys (n, d), contiguous float32, in these rows (TOGETHER,)."""

    def generate(context, builder, signature, args):
        arrays = [
            context.make_array(kind)(context, builder, value) for kind, value in zip(signature.args, args, strict=True)
        ]
        Chains(builder, *arrays).write()
        return context.get_dummy_value()

    return types.void(keys, rows, query, scores), generate


class Chains:
    """Writes the code of `compiled_chains`."""

    def __init__(self, builder: ir.IRBuilder, keys: Any, rows: Any, query: Any, scores: Any):
        self.builder, self.vectors = builder, Vectors(builder, ir.FloatType(), LANES)
        self.query, self.scores, self.d = query.data, scores.data, builder.extract_value(keys.shape, 1)
        places = (builder.load(self.vectors.at(rows.data, index(i))) for i in range(TOGETHER))
        self.keys = [self.vectors.at(keys.data, builder.mul(place, self.d)) for place in places]
        nothing = ir.Constant(self.vectors.type, [0.0] * LANES)
        self.totals = [cgutils.alloca_once_value(builder, nothing) for _ in range(GROUPS)]

    def write(self) -> None:
        b = self.builder
        whole = b.and_(self.d, index(-LANES))
        with cgutils.for_range_slice(b, index(0), whole, index(LANES), inc=True) as (c, _):
            columns = [transposed(self.vectors, self.loaded(group, c)) for group in range(GROUPS)]
            for j in range(LANES):
                self.add(b.add(c, index(j)), [column[j] for column in columns])
        with cgutils.for_range_slice(b, whole, self.d, index(1), inc=True) as (c, _):
            self.add(c, [self.column(group, c) for group in range(GROUPS)])
        for group, total in enumerate(self.totals):
            self.vectors.store(b.load(total), self.vectors.at(self.scores, index(group * LANES)))

    def loaded(self, group: int, c: Any) -> list[Any]:
        return [self.vectors.load(self.vectors.at(key, c)) for key in self.keys[group * LANES :][:LANES]]

    def column(self, group: int, c: Any) -> Any:
        """One component of the keys of a group."""
        made = ir.Constant(self.vectors.type, ir.Undefined)
        for lane, key in enumerate(self.keys[group * LANES :][:LANES]):
            made = self.builder.insert_element(
                made, self.builder.load(self.vectors.at(key, c)), ir.Constant(SHORT, lane)
            )
        return made

    def add(self, c: Any, columns: list[Any]) -> None:
        query = self.vectors.spread(self.builder.load(self.vectors.at(self.query, c)))
        for total, column in zip(self.totals, columns, strict=True):
            self.builder.store(self.vectors.fma(query, column, self.builder.load(total)), total)


def transposed(vectors: Vectors, rows: list[Any]) -> list[Any]:
    """Eight registers of eight numbers with rows and columns exchanged."""
    for distance, low, high in ROUNDS:
        made = list(rows)
        for i in range(LANES):
            if i & distance == 0:
                pair = rows[i], rows[i + distance]
                made[i], made[i + distance] = (
                    vectors.builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(SHORT, LANES), mask))
                    for mask in (low, high)
                )
        rows = made
    return [rows[i] for i in ORDER]


def exchanged() -> list[int]:
    """In which order the rounds leave the columns: found by doing them to numbers."""
    rows = [[(i, j) for j in range(LANES)] for i in range(LANES)]
    for distance, low, high in ROUNDS:
        made = list(rows)
        for i in range(LANES):
            if i & distance == 0:
                both = rows[i] + rows[i + distance]
                made[i], made[i + distance] = [both[m] for m in low], [both[m] for m in high]
        rows = made
    return [next(i for i, row in enumerate(rows) if row == [(r, j) for r in range(LANES)]) for j in range(LANES)]


ORDER = exchanged()


def plain_chains(keys, rows, query, scores):
    """The same function in NumPy."""
    total = np.zeros(TOGETHER, np.float32)
    for key, number in zip(keys[rows].T, query, strict=True):
        total = fused(number, key, total)
    scores[:] = total


chains = plain_chains if config.DISABLE_JIT else compiled_chains
