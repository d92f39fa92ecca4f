"""What keys and values are stored as: the rounding is the dtype's own, and search is exact for what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from perdure.memory.storage import DTYPES, computing, decode, encode

import perdure

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 0.5 / 127, "float64": 2.0**-53}


def stored(numbers, dtype):
    parts = encode("x", numbers, dtype)
    return decode(parts["x"], parts.get("x_scales"))


@given(st.data())
def test_bfloat16_rounds_as_torch_does(data):
    numbers = data.draw(strategies.values((5, 7), strategies.EXTREMES)).astype(np.float32)
    np.testing.assert_array_equal(stored(numbers, "bfloat16"), torch.tensor(numbers).bfloat16().float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_what_is_stored_is_near_what_was_given(dtype, data):
    numbers = data.draw(strategies.values((3, 5, 7)))
    got = stored(numbers, dtype)
    assert got.dtype == computing(dtype)
    largest = np.abs(numbers).max(axis=-1, keepdims=True)
    assert (np.abs(got - numbers) <= 1.01 * UNIT_ROUNDOFF[dtype] * largest + 2.0**-24 * (dtype == "float16")).all()
    np.testing.assert_array_equal(stored(got, dtype), got)  # stored once more, nothing is lost


@pytest.mark.parametrize("space", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_search_and_read_are_exact_for_what_is_stored(dtype, space, data):
    n, capacity, k = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9))
    keys = data.draw(strategies.values((1, 2, n, 6)))
    values, queries = data.draw(strategies.values((1, 2, n, 3))), data.draw(strategies.values((1, 2, 4, 6)))
    memory = perdure.KNNMemory(1, 2, 6, capacity, value_dim=3, space=space, dtype=dtype)
    memory.write(keys, values)
    wide = computing(dtype)
    kept, asked = stored(keys, dtype)[:, :, -capacity:].astype(wide), queries.astype(wide)
    near, reading = memory.search(queries, k), memory.read(queries, k)
    oracle = perdure.top_k(asked, kept, k, space=space)
    found = oracle.positions >= 0
    positions = np.where(found, oracle.positions + max(n - capacity, 0), -1)
    if dtype != "int8":  # whose scores take the scale last
        np.testing.assert_array_equal(near.positions, positions)
        np.testing.assert_array_equal(reading.neighbours.positions, positions)
    tolerance = 1e-5 if wide == np.float32 else 1e-12
    size = 1 + np.abs(np.where(found, oracle.scores, 0)).max()
    np.testing.assert_allclose(near.scores, oracle.scores, rtol=0, atol=tolerance * size)
    slots = np.where(near.positions >= 0, near.positions - max(n - capacity, 0), 0)
    heads = np.arange(2)[None, :, None, None]
    np.testing.assert_array_equal(near.keys, np.where(found[..., None], kept[0, heads, slots], 0))
    own = stored(values, dtype)[:, :, -capacity:]
    expected = perdure.attend(asked, kept, own.astype(wide), slots * found - ~found)
    reach = tolerance * (1 + np.linalg.norm(asked, axis=-1).max() * np.linalg.norm(kept, axis=-1).max())
    np.testing.assert_allclose(reading.lse, expected.lse, rtol=0, atol=reach)
    np.testing.assert_allclose(reading.output, expected.output, rtol=0, atol=10 * reach * (1 + np.abs(own).max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_memory_reads_the_same(dtype, rng):
    memory = perdure.KNNMemory(2, 2, 5, 40, dtype=dtype, max_norm=2.0)
    keys, queries = rng.standard_normal((2, 2, 60, 5)), rng.standard_normal((2, 2, 3, 5))
    memory.write(keys, keys, tags=7)
    again = perdure.KNNMemory.from_state_dict(memory.state_dict())
    for one, other in ((memory, again),):
        np.testing.assert_array_equal(one.read(queries, 5).output, other.read(queries, 5).output)
        one.write(keys[:, :, :9], keys[:, :, :9])
        other.write(keys[:, :, :9], keys[:, :, :9])
        np.testing.assert_array_equal(one.read(queries, 5).output, other.read(queries, 5).output)
    assert again.max_norm == 2.0


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504), ("bfloat16", 3.3895314e38), ("int8", 1e18)])
def test_overflow_is_refused_and_nothing_written(dtype, largest):
    memory = perdure.KNNMemory(1, 1, 1, 4, dtype=dtype)
    ones = np.ones((1, 1, 1, 1))
    memory.write(ones, ones * largest)
    for bad in (ones * 1e39, ones * np.nan):
        for keys, values in ((ones, bad), (bad, ones)):
            with pytest.raises(perdure.NonFiniteError):
                memory.write(keys, values)
    assert memory.written[0] == 1


def test_narrow_memories_are_smaller(rng):
    keys = rng.standard_normal((1, 2, 1000, 64))
    sizes = {}
    for dtype in DTYPES:
        memory = perdure.KNNMemory(1, 2, 64, 1000, dtype=dtype)
        memory.write(keys, keys)
        memory.search(keys[:, :, :1], 1)
        sizes[dtype] = memory.nbytes / 2000 / 64
    assert sizes["float64"] > sizes["float32"] > sizes["bfloat16"] > sizes["int8"]
    assert sizes["int8"] < 3.3  # bytes a component: key, value, and the key in its panel, with their scales
    assert sizes["bfloat16"] < 6.3


def test_a_poisoned_key_draws_no_more_than_its_share(rng):
    """Five keys of norm 100 among 10,000: at the others' norm they are five keys among 10,000."""
    keys = rng.standard_normal((1, 1, 10_000, 16))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    queries = rng.standard_normal((1, 1, 50, 16))
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    poisoned = rng.choice(10_000, 5, replace=False)
    keys[0, 0, poisoned] *= 100
    mark = np.zeros((1, 1, 10_000, 1))
    mark[0, 0, poisoned] = 1
    mass = {}
    for max_norm in (None, 1.0):
        memory = perdure.KNNMemory(1, 1, 16, 10_000, value_dim=1, max_norm=max_norm)
        memory.write(keys, mark)
        mass[max_norm] = memory.read(queries, k=32).output.mean()
    assert mass[None] > 0.3
    assert mass[1.0] < 0.02
    for bad in (0, -1.0, np.nan, np.inf, "1", True):
        with pytest.raises(perdure.ArgumentError):
            perdure.KNNMemory(1, 1, 1, 1, max_norm=bad)
