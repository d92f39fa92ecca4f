"""Exact search to the bit: a score is one chain of multiply-adds, whatever the batch, the shard or the order."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import strategies
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config, njit
from perdure.backends.numba import code_tile, coded, machine, panels, shortlist, threads, tile
from perdure.backends.numba import codes as codes_module
from perdure.memory.indexes import ivf

import perdure


def chain(queries, keys, space):
    """Scores (q, n) as they are defined: sequentially over the components, each step rounded once."""
    scores = np.zeros((queries.shape[0], keys.shape[0]), queries.dtype)
    for query, key in zip(queries.T, keys.T, strict=True):
        gap = query[:, None] - key
        scores = tile.fused(-gap, gap, scores) if space == "l2" else tile.fused(query[:, None], key, scores)
    return scores


def best(scores, k):
    """Scores and positions (q, k) by (score, newest)."""
    positions = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    order = np.lexsort((-positions, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, -1), order


def assert_same(near, scores, positions):
    """Equal to the last bit; whatever `near` has beyond the oracle's width is nothing."""
    width = positions.shape[1]
    np.testing.assert_array_equal(np.asarray(near.positions)[..., :width], positions)
    np.testing.assert_array_equal(np.asarray(near.scores)[..., :width], scores)
    assert (np.asarray(near.positions)[..., width:] == -1).all()


@pytest.mark.skipif(not machine.fuses(), reason="this CPU rounds a·b + c twice")
@given(*(st.floats(width=32, allow_nan=False, min_value=-(2.0**60), max_value=2.0**60),) * 3)
def test_the_oracles_multiply_add_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = tile.fused(np.float32(a), np.float32(b), np.float32(c))
    below, above = (np.nextafter(got, np.float32(side)) for side in (-np.inf, np.inf))
    off = abs(Fraction(float(got)) - exact)
    for other in (below, above):
        away = abs(Fraction(float(other)) - exact)
        assert off < away or (off == away and int(np.array(got).view(np.uint32)) & 1 == 0)


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="there is no compiled tile to compare")
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize(
    ("shape", "stored"),
    [(tile.MANY, stored) for stored in ("float32", "float64", "int16", "uint16", "int8")]
    + [(tile.ONE, "float32"), (tile.FEW, "float32")],
)
def test_the_compiled_tile_is_the_plain_one(rng, shape, stored, l2):
    compiled, plain = tile.make_tile(*shape, l2), tile.plain_tile(*shape, l2)
    run = njit(lambda keys, scales, p, grouped, g, bounds, scores, hits: compiled(
        keys, scales, p, grouped, g, bounds, scores, hits
    ))  # fmt: skip
    computing = np.dtype("float64" if stored == "float64" else "float32")
    wide, (many, size) = tile.lanes(computing), shape
    for d in (0, 1, 5, 32):
        numbers = rng.standard_normal((many + 1, d, wide))
        keys = {
            "int16": lambda n: n.astype(np.float16).view(np.int16),
            "uint16": lambda n: (n.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
            "int8": lambda n: (n * 30).astype(np.int8),
        }.get(stored, lambda n: n.astype(stored))(numbers)
        scales = rng.random((many + 1, wide)).astype(np.float32)
        grouped = rng.standard_normal((2, d, size)).astype(computing)
        for bound in (-np.inf, 0.5, np.inf):
            bounds = np.full(2 * size, bound, computing)
            outcomes = []
            for function in (run, plain):
                scores, hits = np.zeros(size * many * wide, computing), np.zeros(size, np.int64)
                outcomes.append((function(keys, scales, 1, grouped, 1, bounds, scores, hits), scores, hits))
            (found, scores, hits), (plain_found, plain_scores, plain_hits) = outcomes
            assert found == plain_found
            if found < len(grouped):
                np.testing.assert_array_equal(hits, plain_hits)
                if stored == "float64":
                    np.testing.assert_allclose(scores, plain_scores, rtol=1e-13, atol=1e-13)
                else:
                    np.testing.assert_array_equal(scores, plain_scores)


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="there is no compiled tile to compare")
@pytest.mark.skipif(not machine.multiplies_bytes(), reason="this CPU has no instruction for it")
@pytest.mark.parametrize("shape", [code_tile.ONE, code_tile.FEW, code_tile.MANY])
def test_the_compiled_tile_of_codes_is_the_plain_one(rng, shape):
    compiled, plain = code_tile.make_code_tile(*shape), code_tile.plain_code_tile(*shape)
    run = njit(lambda c, s, e, z, p, a, t, r, m, g, b, low, high, hits: compiled(
        c, s, e, z, p, a, t, r, m, g, b, low, high, hits
    ))  # fmt: skip
    highest, plain_highest = code_tile.make_highest(*shape), code_tile.plain_highest(*shape)
    raised = njit(lambda c, s, e, z, p, a, t, r, m, maxima: highest(c, s, e, z, p, a, t, r, m, maxima))
    wide, (many, size), d = tile.lanes(np.float32), shape, 200  # of which a few chunks are made
    slots = (many + 1) * wide
    keys, queries = rng.standard_normal((slots, d)).astype("f"), rng.standard_normal((2 * size, d)).astype("f")
    keys[wide], queries[size] = 1, 1  # the largest sums there can be
    key_codes = coded.empty_codes(slots, d)
    codes_module.encode_keys(keys, np.arange(slots), np.zeros(d), *key_codes)
    asked, _ = coded.encoded(queries, size)
    for bound in (-np.inf, 1e4, np.inf):
        outcomes = []
        for function in (run, plain):
            low, high = np.zeros((2, size * many * wide), np.float32)
            hits, bounds = np.zeros(size, np.int64), np.full(2 * size, bound, np.float32)
            outcomes.append((function(*key_codes, 1, *asked, 1, bounds, low, high, hits), low, high, hits))
        (reached, low, high, hits), (plain_reached, plain_low, plain_high, plain_hits) = outcomes
        assert reached == plain_reached
        if reached == 1:
            np.testing.assert_array_equal(hits, plain_hits)
            np.testing.assert_allclose(low, plain_low, rtol=1e-5, atol=0.01)
            np.testing.assert_allclose(high, plain_high, rtol=1e-5, atol=0.01)
    maxima, plain_maxima = rng.normal(0, 1e4, (2, 2 * size, 3 * many * wide)).astype("f")
    plain_maxima[:] = maxima
    for function, array in ((raised, maxima), (plain_highest, plain_maxima)):
        function(*key_codes, 1, *asked, array[:, many * wide : 2 * many * wide])
    np.testing.assert_allclose(maxima, plain_maxima, rtol=1e-5, atol=0.01)


@given(st.data())
def test_codes_bound_every_score(data):
    d = data.draw(st.sampled_from((1, 3, 4, 64, 255)))
    queries = data.draw(strategies.values((6, d), strategies.EXTREMES)).astype(np.float32)
    keys = data.draw(strategies.values((70, d), strategies.EXTREMES)).astype(np.float32)
    made = coded.Codes(1, d, "ip")
    made.grow(len(keys))
    made.write(keys[None], None, 0)
    if data.draw(st.booleans()):
        made.settle_down(keys[None])  # around their mean
    asked, bounds = coded.encoded(queries, coded.SIZES[-1])
    size = asked[0].shape[2] // 4
    exact = chain(queries, keys, "ip") - (queries.astype(np.float64) @ made.centres[0])[:, None]
    ends = code_tile.plain_code_tile(1, size)
    wide = tile.lanes(np.float32)
    for panel in range(-(-len(keys) // wide)):
        for group in range(len(asked[0])):
            low, high, hits = np.zeros(size * wide, "f"), np.zeros(size * wide, "f"), np.zeros(size, np.int64)
            ends(*made.heads[0], panel, *asked, group, np.full_like(bounds, -np.inf), low, high, hits)
            for j in range(size):
                i, slots = group * size + j, slice(panel * wide, min((panel + 1) * wide, len(keys)))
                if i < len(queries) and bounds[i] < np.inf:
                    step = codes_module.coarseness(
                        np.pad(queries[i].astype(np.float64), (0, -d % 4)), codes_module.QUERY_LEVELS
                    )
                    count = slots.stop - slots.start
                    assert (low[j * wide :][:count] * step <= exact[i, slots]).all()
                    assert (high[j * wide :][:count] * step >= exact[i, slots]).all()


@st.composite
def searches(draw):
    d, n = draw(st.sampled_from((1, 2, 3, 8, 31, 64, 256))), draw(st.sampled_from((1, 15, 16, 17, 63, 64, 65, 300)))
    q = draw(st.integers(1, 14))
    numbers = (draw(strategies.values(shape, strategies.EXTREMES)).astype(np.float32) for shape in ((q, d), (n, d)))
    return *numbers, draw(st.sampled_from((1, 2, 5, 32, 100, 512)))


@given(searches(), st.sampled_from(("ip", "l2")))
def test_top_k_is_the_chain_and_the_tie_rule(case, space):
    queries, keys, k = case
    assert_same(perdure.top_k(queries, keys, k, space=space), *best(chain(queries, keys, space), k))


@given(searches(), st.data())
def test_shards_and_batches_do_not_change_a_bit(case, data):
    queries, keys, k = case
    for space in ("ip", "cosine", "l2"):
        whole = perdure.top_k(queries, keys, k, space=space)
        some = data.draw(st.permutations(range(len(queries))))[: data.draw(st.integers(1, len(queries)))]
        part = perdure.top_k(queries[some], keys, k, space=space)
        assert_same(part, whole.scores[some], whole.positions[some])
        cut = data.draw(st.integers(0, len(keys)))
        shards = [perdure.top_k(queries, shard, k, space=space) for shard in (keys[:cut], keys[cut:])]
        positions = np.concatenate(
            [shards[0].positions, np.where(shards[1].positions < 0, -1, shards[1].positions + cut)], -1
        )
        scores = np.concatenate([s.scores for s in shards], -1)
        order = np.lexsort((-positions, -scores), axis=-1)[:, : min(k, len(keys))]
        assert_same(whole, np.take_along_axis(scores, order, -1), np.take_along_axis(positions, order, -1))


@given(searches())
def test_no_key_is_better_in_float64_than_float32_can_tell(case):
    queries, keys, k = case
    near = perdure.top_k(queries, keys, k)
    exact = queries.astype(np.float64) @ keys.astype(np.float64).T
    kth = np.sort(exact, axis=-1)[:, ::-1][:, min(k, len(keys)) - 1]
    got = np.take_along_axis(exact, near.positions[:, : min(k, len(keys))], -1)
    sizes = np.linalg.norm(queries.astype(np.float64), axis=1) * np.linalg.norm(keys.astype(np.float64), axis=1).max()
    slack = queries.shape[1] * (2.0**-23 * sizes + 2.0**-148)
    assert (got >= (kth - slack)[:, None]).all()


@pytest.mark.parametrize("fewest", [0, 128, coded.FEWEST], ids=["codes", "panels and then codes", "panels"])
@settings(max_examples=30)
@given(st.data())
def test_a_memory_finds_what_its_stream_holds(fewest, data):
    """Through growth, wrap-around, any segment lengths, and the sampled start of large searches."""
    with mock.patch.object(coded, "FEWEST", fewest):
        finds_what_its_stream_holds(data)


def finds_what_its_stream_holds(data):
    d, k = data.draw(st.sampled_from((1, 4, 17))), data.draw(st.sampled_from((1, 4, 40)))
    large = 70 if config.DISABLE_JIT else max(coded.SAMPLED) * tile.lanes(np.float32) * tile.ONE[0]
    capacity = data.draw(st.sampled_from((1, 50, 64, large, large + 37)))
    space = data.draw(st.sampled_from(("ip", "l2")))
    memory = perdure.KNNMemory(1, 1, d, capacity, space=space)
    stream = np.empty((0, d), np.float32)
    for _ in range(3):
        n = data.draw(st.sampled_from((1, 63, 200, capacity, capacity + 5)))
        segment = data.draw(strategies.values((n, d), strategies.EXTREMES)).astype(np.float32)
        memory.write(segment[None, None], segment[None, None])
        stream = np.concatenate([stream, segment])
        queries = data.draw(strategies.values((data.draw(st.integers(1, 14)), d))).astype(np.float32)
        kept = stream[-capacity:]
        scores, positions = best(chain(queries, kept, space), k)
        near = memory.search(queries[None, None], k)
        assert_same(
            perdure.Neighbours(near.scores[0, 0], near.positions[0, 0]), scores, positions + len(stream) - len(kept)
        )


@pytest.mark.parametrize("space", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["distinct", "few", "equal", "rising"])
def test_the_short_list_is_what_a_scan_finds(rng, dtype, space, kind):
    """Many queries are searched for otherwise than few; before the ring closes, and after."""
    stream = rng.standard_normal((1, 2, 700, 6)).astype(np.float32)
    if kind == "few":
        stream = stream[:, :, rng.integers(0, 9, 700)]
    elif kind == "equal":
        stream[:] = stream[:, :, :1]
    elif kind == "rising":
        stream = stream[:, :, :1] * np.linspace(-1, 1, 700, dtype=np.float32)[:, None]
    memory = perdure.KNNMemory(1, 2, 6, 400, dtype=dtype, space=space)
    queries = rng.standard_normal((1, 2, 20, 6)).astype(np.float32)
    for part in np.split(stream, (290, 390, 500), axis=2):
        memory.write(part, part)
        for k in (1, 7, 33):
            together = memory.search(queries, k)
            for i in range(0, 20, 5):
                few = memory.search(queries[:, :, i : i + 5], k)
                np.testing.assert_array_equal(together.scores[:, :, i : i + 5], few.scores)
                np.testing.assert_array_equal(together.positions[:, :, i : i + 5], few.positions)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_shortlists_computes_as_its_plain_twin(rng, dtype):
    row, maxima = rng.standard_normal(192).astype(dtype), rng.standard_normal(128).astype(dtype)
    for first in (0, 64, 100):
        run = shortlist.reached if config.DISABLE_JIT else njit(lambda r, f, b: shortlist.reached(r, f, b))
        assert run(row, first, row[first + 3]) == shortlist.plain_reached(row, first, row[first + 3])
        raised, plain = maxima.copy(), maxima.copy()
        run = shortlist.raise_to if config.DISABLE_JIT else njit(lambda m, a, r, f: shortlist.raise_to(m, a, r, f))
        run(raised, 64, row, first)
        shortlist.plain_raise_to(plain, 64, row, first)
        np.testing.assert_array_equal(raised, plain)


@given(strategies.values((1, 128), strategies.EXTREMES), st.integers(1, 128))
def test_as_many_maxima_as_asked_for_reach_the_bound(maxima, k):
    maxima = maxima[0].astype(np.float32)
    assert (maxima >= shortlist.reached_by(maxima, k)).sum() >= k


@given(searches())
def test_float16_keys_are_searched_as_what_they_are(case):
    queries, keys, k = case
    with np.errstate(over="ignore"):
        keys = np.clip(keys, -60000, 60000).astype(np.float16)
    memory = perdure.KNNMemory(1, 1, keys.shape[1], len(keys), dtype="float16")
    memory.write(keys[None, None], keys[None, None])
    near = memory.search(queries[None, None], k)
    scores, positions = best(chain(queries, keys.astype(np.float32), "ip"), k)
    assert_same(perdure.Neighbours(near.scores[0, 0], near.positions[0, 0]), scores, positions)


@pytest.mark.parametrize("count", [2, 3], ids=["rows", "heads"])
def test_threads_change_nothing(rng, monkeypatch, count):
    """Two rows: side by side on two threads, one after the other on three."""
    memory = perdure.KNNMemory(2, 3, 8, 300)
    keys, queries = rng.standard_normal((2, 3, 400, 8)), rng.standard_normal((2, 3, 50, 8))
    memory.write(keys, keys)
    alone = memory.read(queries, 5)
    monkeypatch.setattr(config, "NUMBA_NUM_THREADS", count)
    monkeypatch.setattr(threads, "_pool", None)
    together = memory.read(queries, 5)
    for name in ("output", "lse"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(together, name))
    np.testing.assert_array_equal(alone.neighbours.positions, together.neighbours.positions)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_searches_with_threads_of_its_own():
    program = """
import os, numpy as np, perdure
keys = np.random.default_rng(0).standard_normal((4, 100, 8)).astype("float32")
first = perdure.top_k(keys, keys, 3).positions
child = os.fork()
if child == 0:
    os._exit(0 if (perdure.top_k(keys, keys, 3).positions == first).all() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=120).returncode == 0


def test_codes_give_way_where_keys_are_all_alike(rng):
    """Panels take over, for a while; what is found does not change."""
    keys = np.repeat(rng.standard_normal((1, 1, 1, 8)), 5000, axis=2).astype(np.float32)
    queries = rng.standard_normal((1, 1, 4, 8)).astype(np.float32)
    with mock.patch.object(coded, "FEWEST", 0), mock.patch.object(coded, "TIRED", 3):
        memory = perdure.KNNMemory(1, 1, 8, 5000)
        memory.write(keys, keys)
        for turn in range(8):
            near = memory.search(queries, 3)
            np.testing.assert_array_equal(near.positions[0, 0], [[4999, 4998, 4997]] * 4)
            kept = memory._rows[0].index.kept
            if machine.multiplies_bytes():
                assert (kept.panels is not None) == (turn not in (0, 4, 8))


@pytest.mark.skipif(bool(config.DISABLE_JIT) or not machine.is_x86(), reason="compiles for x86")
def test_the_tile_of_codes_compiles_to_one_instruction_with_vnni():
    """Not run, for few machines could: compiled for one that has it, it takes that instruction for every sum."""
    program = """
from numba import njit, types
from perdure.backends.numba import code_tile, machine
assert machine.dots() and machine.register_bytes() == 64 and machine.registers() == 32
inner = code_tile.make_code_tile(*code_tile.MANY)
run = njit(lambda c, s, e, z, p, a, t, r, m, g, b, low, high, hits: inner(
    c, s, e, z, p, a, t, r, m, g, b, low, high, hits
))
f4, i8, array = types.float32, types.int64, lambda kind, axes: types.Array(kind, axes, "C")
three, one = [array(f4, 2)] * 3, array(f4, 1)
asked = (array(types.int8, 3), array(types.int32, 2), one, one)
run.compile((array(types.uint8, 3), *three, i8, *asked, i8, one, one, one, array(i8, 1)))
assembly = "".join(run.inspect_asm().values())
panels, queries = code_tile.MANY
assert assembly.count("vpdpbusd") >= 2 * panels * queries, assembly.count("vpdpbusd")
assert "vpmaddubsw" not in assembly
"""
    features = ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c", "lzcnt", "popcnt")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "cascadelake",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_panels_start_on_cache_lines():
    made = panels.empty_panels(5, 3, np.float32, np.float32)
    assert made.ctypes.data % 64 == 0
    assert made.shape[0] % tile.ONE[0] == 0


@pytest.mark.parametrize("index", ["exact", "ivf"])
def test_keys_too_alike_for_codes_are_told_apart_by_their_cosine(rng, monkeypatch, index):
    """What codes give up on is scored as all else is, so that the same query has the same neighbours twice."""
    monkeypatch.setattr(coded, "FEWEST", 0)
    monkeypatch.setattr(ivf, "FIRST", 256)
    one = np.repeat(rng.standard_normal((1, 32)), 6000, 0)
    keys = (one * (1 + rng.integers(-2, 3, one.shape) * 2.0**-23)).astype(np.float32)[None, None]
    queries = rng.standard_normal((1, 1, 4, 32)).astype(np.float32)
    memory = perdure.KNNMemory(1, 1, 32, 6000, space="cosine", index=index, target_recall=1.0)
    memory.write(keys, keys)
    expected = perdure.top_k(queries, keys, 8, "cosine")
    for _ in range(2):
        near = memory.search(queries, 8)
        np.testing.assert_array_equal(near.scores, expected.scores)
        np.testing.assert_array_equal(near.positions, expected.positions)


def test_a_limit_of_threadpoolctl_holds_here(rng, monkeypatch):
    """No more threads work at once than it allows, and before and after as many as NUMBA_NUM_THREADS says."""
    monkeypatch.setattr(config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(threads, "_pool", None)
    inside, most = [], []

    def work(i):
        inside.append(i)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(i)
        return 2 * i

    tasks = [(i,) for i in range(12)]
    for limit in (4, 1, 2, 9):
        most.clear()
        with threadpoolctl.threadpool_limits(limit):
            assert threads.limit() == min(limit, 4)
            assert threads.in_parallel(work, tasks) == [2 * i for i in range(12)]
        assert max(most) <= limit
    assert threads.limit() == 4
