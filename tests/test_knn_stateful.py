"""KNNMemory against lists: whatever is written, masked, cleared, saved and read, with every index."""

from __future__ import annotations

import contextlib
import warnings
from unittest import mock

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from perdure.backends.numba import coded
from perdure.memory.indexes import auto, hnsw, ivf

import perdure

INDEXES = ("exact", "ivf", "hnsw", "auto")
COSTS = ({"lists": 1e-6, "trained": 1e-6}, {"walked": 1e-6, "built": 1e-6}, {"few": 1.0})  # each suits another index


def begin_early():
    """Indexes that code, list and link keys, and change their minds, at sizes that a list can follow."""
    stack = contextlib.ExitStack()
    for module, name, value in (
        (coded, "FEWEST", 32),
        (ivf, "FIRST", 24),
        (hnsw, "SMALLEST", 16),
        (auto, "EVERY", 2),
    ):
        stack.enter_context(mock.patch.object(module, name, value))
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore", perdure.RecallWarning)
    return stack


def content(memory):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in memory.state_dict().items()}


class AgainstLists(RuleBasedStateMachine):
    """Every row is a Python list of (position, keys, values, tag); reading is a loop over it."""

    index = "exact"

    @initialize(data=st.data())
    def make(self, data):
        self.early = begin_early()
        self.rows, self.heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        self.dim, self.width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
        self.capacity = data.draw(st.integers(1, 90) | st.sampled_from((40, 64, 90)))
        self.space = data.draw(st.sampled_from(("ip", "cosine", "l2")))
        self.dtype = data.draw(st.sampled_from(("float32", "float64") if self.index != "hnsw" else ("float32",)))
        self.memory = perdure.KNNMemory(
            *(self.rows, self.heads, self.dim, self.capacity),
            **{"value_dim": self.width, "space": self.space, "dtype": self.dtype, "index": self.index},
            costs=data.draw(st.sampled_from(COSTS)) if self.index == "auto" else None,
        )
        self.lists = [[] for _ in range(self.rows)]
        self.counts = [0] * self.rows

    def teardown(self):
        if hasattr(self, "early"):
            self.early.close()

    def some_rows(self, data):
        chosen = data.draw(st.none() | st.permutations(range(self.rows)))
        return chosen if chosen is None else chosen[: data.draw(st.integers(1, self.rows))]

    def vectors(self, data, shape):
        return data.draw(strategies.values(shape)).astype(self.dtype)

    @rule(data=st.data(), n=st.one_of(st.integers(0, 10), st.integers(60, 200)))
    def write(self, data, n):
        self.write_to(self.some_rows(data), data, n)

    @rule(data=st.data(), n=st.integers(1, 12), filled=st.booleans())
    def steps(self, data, n, filled):
        """What a memory is for: a little in, the oldest out, and read; the oldest are gone, however it is searched."""
        if filled:
            self.write_to(None, data, self.capacity)
        for _ in range(4):
            self.read_from(None, data, k=12, q=2, group=1)
            self.write_to(None, data, n)

    def write_to(self, rows, data, n):
        chosen = list(range(self.rows)) if rows is None else rows
        keys = self.vectors(data, (len(chosen), self.heads, n, self.dim))
        values = self.vectors(data, (len(chosen), self.heads, n, self.width))
        mask = data.draw(st.none() | strategies.masks((len(chosen), n)))
        tags = np.random.default_rng(n).integers(0, 99, (len(chosen), n)) if data.draw(st.booleans()) else None
        self.memory.write(keys, values, rows=rows, mask=mask, tags=tags)
        for i, row in enumerate(chosen):
            for j in range(n):
                if mask is None or mask[i, j]:
                    tag = -1 if tags is None else tags[i, j]
                    self.lists[row].append((self.counts[row], keys[i, :, j], values[i, :, j], tag))
                    self.counts[row] += 1
            self.lists[row] = self.lists[row][-self.capacity :]

    @rule(data=st.data())
    def clear(self, data):
        rows = self.some_rows(data)
        self.memory.clear(rows)
        for row in range(self.rows) if rows is None else rows:
            self.lists[row], self.counts[row] = [], 0

    @rule()
    def save_and_load(self):
        before = content(self.memory)
        self.memory = perdure.KNNMemory.from_state_dict(self.memory.state_dict())
        assert content(self.memory) == before

    @rule(data=st.data(), k=st.integers(1, 12), q=st.integers(0, 4), group=st.integers(1, 2))
    def read(self, data, k, q, group):
        self.read_from(self.some_rows(data), data, k, q, group)

    def read_from(self, rows, data, k, q, group):
        chosen = list(range(self.rows)) if rows is None else rows
        queries = self.vectors(data, (len(chosen), group * self.heads, q, self.dim))
        near, reading = self.memory.search(queries, k, rows=rows), self.memory.read(queries, k, scale=0.5, rows=rows)
        for i, row in enumerate(chosen):
            for h in range(group * self.heads):
                for j in range(q):
                    self.check(row, h // group, queries[i, h, j], near, reading, (i, h, j))

    def check(self, row, head, query, near, reading, at):
        """Distinct tokens of the row, as many as there are, rightly scored, best first: the best of all if exact."""
        stored = {position: (keys[head], values[head], tag) for position, keys, values, tag in self.lists[row]}
        scores = {p: self.score(query, key) for p, (key, _, _) in stored.items()}
        for positions, got in (
            (near.positions[at], near.scores[at]),
            (reading.neighbours.positions[at], reading.neighbours.scores[at]),
        ):
            found = [p for p in positions if p >= 0]
            assert len(found) == len(set(found)) == min(len(positions), len(stored))
            assert set(found) <= stored.keys()
            assert (positions[len(found) :] == -1).all()
            assert (got[len(found) :] == -np.inf).all()
            assert (np.diff(got[: len(found)]) <= 0).all()
            near_enough = {"rtol": 0, "atol": self.rounding(query, stored)}
            np.testing.assert_allclose(got[: len(found)], [scores[p] for p in found], **near_enough)
            if self.index == "exact":
                best = sorted(scores.values(), reverse=True)[: len(found)]
                np.testing.assert_allclose(got[: len(found)], best, **near_enough)
        for place, p in enumerate(near.positions[at]):
            key, value, tag = stored[p] if p >= 0 else (0, 0, -1)
            np.testing.assert_array_equal(near.keys[at][place], key)
            np.testing.assert_array_equal(near.values[at][place], value)
            assert (-1 if near.tags is None else near.tags[at][place]) == tag
        self.check_attention(query, [stored[p] for p in found], reading.output[at], reading.lse[at])

    def check_attention(self, query, entries, output, lse):
        if not entries:
            assert (output == 0).all()
            assert lse == -np.inf
            return
        logits = np.array([0.5 * query.astype(np.float64) @ key for key, _, _ in entries])
        weights = np.exp(logits - logits.max())
        expected = weights / weights.sum() @ np.array([value for _, value, _ in entries], np.float64)
        loose = 1 if self.dtype == "float64" else 1e6
        size = 1 + np.linalg.norm(query) * max(np.linalg.norm(key) for key, _, _ in entries)
        np.testing.assert_allclose(output, expected, rtol=1e-9 * loose, atol=1e-9 * size * loose)
        np.testing.assert_allclose(lse, logits.max() + np.log(weights.sum()), rtol=0, atol=1e-12 * size * loose)

    def rounding(self, query, stored):
        size = 1 + np.sum(query**2) + max((np.sum(key**2) for key, _, _ in stored.values()), default=0)
        return size * (1e-9 if self.dtype == "float64" else 3e-6)

    def score(self, query, key):
        query, key = query.astype(np.float64), key.astype(np.float64)
        if self.space == "l2":
            return -np.sum((query - key) ** 2)
        norms = np.linalg.norm(query) * np.linalg.norm(key) if self.space == "cosine" else 1.0
        return query @ key / norms if norms else 0.0

    @invariant()
    def counts_agree(self):
        assert self.memory.tokens.tolist() == [len(entries) for entries in self.lists]
        assert self.memory.written.tolist() == self.counts


def machine(index):
    case = type(f"AgainstLists_{index}", (AgainstLists,), {"index": index}).TestCase
    case.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
    return case


TestExact, TestIVF, TestHNSW, TestAuto = (machine(index) for index in INDEXES)


@pytest.mark.parametrize("index", INDEXES)
@settings(max_examples=15)
@given(data=st.data())
def test_other_rows_and_cleared_documents_leave_no_trace(index, data):
    """A row among others, and after documents that were cleared, answers to the bit as a memory of its own."""
    with begin_early():
        shape = {"heads": 1, "dim": 3, "capacity": data.draw(st.sampled_from((1, 40, 100))), "index": index}
        shape["costs"] = data.draw(st.sampled_from(COSTS)) if index == "auto" else None
        crowd, alone = perdure.KNNMemory(rows=3, **shape), perdure.KNNMemory(rows=1, **shape)
        for _ in range(data.draw(st.integers(1, 10))):
            act, other = data.draw(st.sampled_from(("write", "write", "clear", "read"))), data.draw(st.booleans())
            rows = data.draw(st.sampled_from(([0], [2], [2, 0]))) if other else [1]
            if act == "write":
                vectors = data.draw(strategies.values((len(rows), 1, data.draw(st.sampled_from((1, 30, 150))), 3)))
                crowd.write(vectors, vectors, rows=rows)
                if not other:
                    alone.write(vectors, vectors)
            elif act == "clear":
                crowd.clear(rows)
                alone = alone if other else perdure.KNNMemory(rows=1, **shape)
            else:
                queries = data.draw(strategies.values((len(rows), 1, 3, 3)))
                mine = crowd.read(queries, 5, rows=rows)
                if not other:
                    same(mine, alone.read(queries, 5))


def same(a, b):
    for one, two in ((a.output, b.output), (a.lse, b.lse), *zip(parts(a), parts(b), strict=True)):
        np.testing.assert_array_equal(one, two)


def parts(reading):
    return reading.neighbours.scores, reading.neighbours.positions
