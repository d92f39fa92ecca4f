"""KNNMemory: what it promises, and what it refuses."""

from __future__ import annotations

import copy
import hashlib
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from perdure.memory.protocol import Memory

import perdure


def fingerprint(memory):
    """A hash of everything the memory would save."""
    digest = hashlib.sha256()
    for name, array in sorted(memory.state_dict().items()):
        digest.update(name.encode() + str((array.dtype, array.shape)).encode() + array.tobytes())
    return digest.hexdigest()


def make(rows=2, heads=2, dim=4, capacity=8, **options):
    return perdure.KNNMemory(rows, heads, dim, capacity, **options)


def segment(rng, rows=2, heads=2, n=5, dim=4):
    return rng.standard_normal((rows, heads, n, dim)), rng.standard_normal((rows, heads, n, dim))


def test_it_is_a_memory():
    assert isinstance(make(), Memory)


def test_chunking_changes_nothing(rng):
    keys, values = segment(rng, n=30)
    whole, parts = make(capacity=13), make(capacity=13)
    whole.write(keys, values)
    for a, b in ((0, 1), (1, 1), (1, 14), (14, 30)):
        parts.write(keys[:, :, a:b], values[:, :, a:b])
    assert fingerprint_of_content(whole) == fingerprint_of_content(parts)


def fingerprint_of_content(memory):
    """A hash of what every stored token answers, whatever slot it lies in."""
    near = memory.search(np.eye(4, dtype="f")[None, None].repeat(2, 0).repeat(2, 1), k=13)
    return [a.tobytes() for a in (near.scores, near.positions, near.keys, near.values)]


def test_a_cleared_row_is_gone_and_the_others_stay(rng):
    memory = make()
    keys, values = segment(rng)
    memory.write(keys, values)
    before = memory.read(keys, k=3)
    memory.clear([1])
    after = memory.read(keys, k=3)
    np.testing.assert_array_equal(after.output[0], before.output[0])
    assert (after.output[1] == 0).all()
    assert (after.neighbours.positions[1] == -1).all()
    memory.write(keys[1:], values[1:] + 1, rows=[1])
    assert memory.search(keys, k=9).positions[1].max() == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_tensors_come_back_as_torch_tensors(dtype):
    memory = make()
    keys = torch.randn(2, 2, 5, 4).to(getattr(torch, dtype))
    memory.write(keys, keys)
    reading, near = memory.read(keys.requires_grad_(), k=2), memory.search(keys, k=2)
    assert reading.output.dtype == near.scores.dtype == near.keys.dtype == keys.dtype
    assert reading.lse.dtype == torch.promote_types(keys.dtype, torch.float32)
    assert near.positions.dtype == torch.int64
    assert not reading.output.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_a_copy_is_equal_and_goes_its_own_way(rng, copied):
    memory = make()
    memory.write(*segment(rng))
    other = copied(memory)
    assert fingerprint(other) == fingerprint(memory)
    other.write(*segment(rng))
    assert (memory.written == 5).all()
    assert (other.written == 10).all()


@pytest.mark.parametrize("space", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("n", [3, 40, 100])
def test_read_is_attend_over_search(rng, dtype, space, n):
    memory = make(capacity=64, dtype=dtype, space=space)
    memory.write(*segment(rng, n=n))
    queries = rng.standard_normal((2, 6, 3, 4))
    reading, near = memory.read(queries, k=5), memory.search(queries, k=5)
    there = (near.positions >= 0)[..., None, :]
    expected = perdure.attend(queries[..., None, :], near.keys.astype("d"), near.values.astype("d"), mask=there)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(reading.output, expected.output[..., 0, :], atol=tolerance)
    np.testing.assert_allclose(reading.lse, expected.lse[..., 0], atol=tolerance)


@pytest.mark.parametrize("tagged", [0, 1])
def test_rows_without_tags_read_minus_one_beside_rows_with_tags(rng, tagged):
    memory = make()
    keys, values = segment(rng, rows=1)
    memory.write(keys, values, rows=[tagged], tags=7)
    memory.write(keys, values, rows=[1 - tagged])
    queries = rng.standard_normal((2, 2, 1, 4))
    for near in (memory.search(queries, k=2), memory.read(queries, k=2).neighbours):
        assert set(near.tags[tagged].ravel()) == {7}
        assert set(near.tags[1 - tagged].ravel()) == {-1}


def test_bytes_follow_what_is_stored(rng):
    memory = make(capacity=100_000)
    assert memory.nbytes == 0
    memory.write(*segment(rng, n=1000))
    assert 2 * 2 * 1000 * 8 * 4 <= memory.nbytes <= 2 * 2 * 2 * 1000 * 8 * 4


@pytest.mark.parametrize(
    ("change", "argument", "error"),
    [
        ({"keys": np.zeros((2, 2, 5, 3))}, "keys", perdure.ShapeError),
        ({"keys": np.zeros((2, 3, 5, 4))}, "keys", perdure.ShapeError),
        ({"keys": np.zeros((1, 2, 2, 5, 4))}, "keys", perdure.ShapeError),
        ({"keys": np.zeros((2, 2, 5, 4), int)}, "keys", perdure.DTypeError),
        ({"keys": np.full((2, 2, 5, 4), np.nan)}, "keys", perdure.NonFiniteError),
        ({"keys": np.full((2, 2, 5, 4), 1e30)}, "keys", perdure.NonFiniteError),
        ({"keys": np.full((2, 2, 5, 4), 1e300)}, "keys", perdure.NonFiniteError),
        ({"values": np.full((2, 2, 5, 4), np.inf)}, "values", perdure.NonFiniteError),
        ({"values": np.zeros((2, 2, 4, 4))}, "values", perdure.ShapeError),
        ({"values": torch.zeros(2, 2, 5, 4)}, "values", perdure.FrameworkError),
        ({"mask": np.ones((2, 4), bool)}, "mask", perdure.ShapeError),
        ({"mask": np.ones((2, 5))}, "mask", perdure.DTypeError),
        ({"mask": [[True] * 5] * 2}, "mask", perdure.FrameworkError),
        ({"tags": np.zeros((2, 4), int)}, "tags", perdure.ShapeError),
        ({"tags": np.zeros((2, 5))}, "tags", perdure.DTypeError),
        ({"tags": np.full((2, 5), 2**64 - 1, np.uint64)}, "tags", perdure.ArgumentError),
        ({"rows": 1}, "rows", perdure.ArgumentError),
        ({"rows": [0, 2]}, "rows", perdure.ArgumentError),
        ({"rows": [1, 1]}, "rows", perdure.ArgumentError),
        ({"rows": [-1, 0]}, "rows", perdure.ArgumentError),
        ({"rows": [1]}, "keys", perdure.ShapeError),
    ],
)
def test_a_rejected_write_changes_nothing(rng, change, argument, error):
    memory = make()
    memory.write(*segment(rng))
    before, (keys, values) = fingerprint(memory), segment(rng)
    with pytest.raises(error) as caught:
        memory.write(**({"keys": keys, "values": values} | change))
    assert caught.value.argument == argument
    assert fingerprint(memory) == before


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"k": 0}, "k"),
        ({"k": 2**62}, "k"),
        ({"queries": np.zeros((2, 3, 1, 4))}, "queries"),
        ({"queries": np.zeros((2, 0, 1, 4))}, "queries"),
        ({"queries": np.zeros((2, 2, 1, 5))}, "queries"),
        ({"queries": np.zeros((1, 2, 1, 4))}, "queries"),
        ({"queries": np.full((2, 2, 1, 4), np.nan)}, "queries"),
        ({"rows": [5]}, "rows"),
        ({"scale": np.nan}, "scale"),
        ({"queries": np.zeros((0, 2, 1, 4)), "rows": []}, "rows"),
    ],
)
def test_what_a_read_rejects(rng, change, argument):
    memory = make()
    memory.write(*segment(rng))
    with pytest.raises(perdure.ArgumentError) as caught:
        memory.read(**({"queries": np.zeros((2, 2, 1, 4)), "k": 2} | change))
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "value"),
    [("rows", 0), ("heads", 0), ("dim", -1), ("capacity", 0), ("value_dim", 0), ("space", "dot"), ("dtype", "int3")]
    + [(argument, 10**30) for argument in ("rows", "heads", "dim", "capacity", "value_dim")],  # nothing could hold it
)
def test_what_construction_rejects(argument, value):
    with pytest.raises(perdure.ArgumentError) as caught:
        make(**{argument: value})
    assert caught.value.argument == argument


@given(data=st.data())
def test_an_altered_state_is_refused(data):
    memory = make()
    rng = np.random.default_rng(0)
    memory.write(*segment(rng), tags=np.arange(10).reshape(2, 5))
    state = memory.state_dict()
    name = data.draw(st.sampled_from(sorted(state)))
    damage = data.draw(st.sampled_from(("missing", "cut", "dtype")))
    if damage == "missing" and not name.endswith("tags"):
        del state[name]
    else:
        state[name] = state[name][:-1] if damage == "cut" else state[name].astype(np.complex64)
    with pytest.raises(perdure.PerdureError):
        perdure.KNNMemory.from_state_dict(state)


@given(data=st.data())
def test_tokens_are_given_back_by_their_positions(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    n, capacity = data.draw(st.integers(0, 20)), data.draw(st.sampled_from((1, 4, 7, 40)))
    memory = make(capacity=capacity)
    keys, values = segment(rng, n=n)
    memory.write(keys, values, tags=np.arange(2 * n).reshape(2, n))
    held = np.arange(max(n - capacity, 0), n)
    asked = np.stack([held[::-1], np.where(held % 2, held, -1)])
    found = memory.at(asked)
    there = (asked >= 0)[:, None, :, None]
    slots = np.where(asked >= 0, asked, 0)[:, None, :, None]
    if held.size:
        np.testing.assert_allclose(found.keys, np.where(there, np.take_along_axis(keys, slots, axis=2), 0), rtol=1e-6)
        np.testing.assert_allclose(
            found.values, np.where(there, np.take_along_axis(values, slots, axis=2), 0), rtol=1e-6
        )
        assert (found.tags == np.where(asked >= 0, asked + np.array([[0], [n]]), -1)).all()
    for wrong in (n, held[0] - 1 if held.size and held[0] else n + 5, -2):
        with pytest.raises(perdure.ArgumentError, match="positions"):
            memory.at(np.full((2, 1), wrong))


@pytest.mark.parametrize("bad", [[[0]], [[0], [0]], None, 3])
def test_positions_that_are_no_array_are_refused(rng, bad):
    memory = make()
    memory.write(*segment(rng))
    with pytest.raises(perdure.ArgumentError, match="positions"):
        memory.at(bad)


@given(data=st.data())
def test_bucketed_selection_is_the_best_of_every_bucket_of_slots(data):
    """Bucket b of k holds the tokens whose slots in the ring are b modulo k, through any number of wrap-arounds."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    capacity, k = data.draw(st.sampled_from((1, 7, 8, 32))), data.draw(st.integers(1, 9))
    n, space = data.draw(st.integers(0, 90)), data.draw(st.sampled_from(("ip", "cosine", "l2")))
    memory = make(rows=1, capacity=capacity, dtype="float64", selection="bucketed", space=space)
    exact = make(rows=1, capacity=capacity, dtype="float64", space=space)
    keys, values = segment(rng, rows=1, n=n)
    for one in (memory, exact):
        one.write(keys, values)
    queries = rng.standard_normal((1, 2, 3, 4))
    near, every = memory.search(queries, k), exact.search(queries, capacity)
    for h, i in np.ndindex(2, 3):
        buckets = {}
        for score, position in zip(every.scores[0, h, i], every.positions[0, h, i], strict=True):
            if position >= 0:
                buckets.setdefault(position % capacity % k, (score, position))
        best = sorted(buckets.values(), reverse=True)
        np.testing.assert_allclose(near.scores[0, h, i, : len(best)], [score for score, _ in best], atol=1e-12)
        np.testing.assert_array_equal(near.positions[0, h, i, : len(best)], [position for _, position in best])
        assert (near.positions[0, h, i, len(best) :] == -1).all()
        assert (near.scores[0, h, i, len(best) :] == -np.inf).all()
    again = perdure.KNNMemory.from_state_dict(memory.state_dict())
    np.testing.assert_array_equal(again.search(queries, k).positions, near.positions)


def test_bucketed_selection_looks_at_every_key():
    with pytest.raises(perdure.ArgumentError, match="selection"):
        make(selection="bucketed", index="ivf")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_values_are_averaged_and_products_out_of_range_told(dtype):
    most = float(np.finfo(dtype).max)
    memory = make(rows=1, heads=1, dtype=dtype)
    ones = np.ones((1, 1, 6, 4), dtype)
    memory.write(ones, 0.7 * most * ones)
    np.testing.assert_allclose(memory.read(ones[:, :, :2], k=6).output, 0.7 * most, rtol=1e-5)
    memory.write(10 * ones[:, :, :3], ones[:, :, :3])
    with pytest.raises(perdure.NonFiniteError, match="queries"):
        memory.read(10 * ones, k=3, scale=most / 3)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8"])
def test_norms_out_of_range_are_refused(dtype):
    for bad in (1e300, 1e-50) if dtype != "float64" else (1e-310,):
        with pytest.raises(perdure.ArgumentError, match="max_norm"):
            make(dtype=dtype, max_norm=bad)


def test_a_tagged_write_that_fails_in_its_second_row_leaves_the_first_untagged(rng, monkeypatch):
    memory = make()
    keys, values = segment(rng)
    memory.write(keys, values)
    before = fingerprint(memory)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(memory._rows[1], "grown", fail)
    with pytest.raises(MemoryError):
        memory.write(keys, values, tags=np.int64(3))
    assert fingerprint(memory) == before
    monkeypatch.undo()
    memory.write(keys, values, tags=np.int64(3))
    assert memory.search(keys, k=1).tags.max() == 3


def test_int8_holds_the_largest_numbers_there_are():
    largest = np.finfo(np.float32).max
    memory = make(rows=1, heads=1, dim=4, dtype="int8")
    values = np.array([largest, -largest, largest / 2, 0], np.float32)[None, None, None]
    memory.write(np.ones((1, 1, 1, 4), np.float32), values)
    found = memory.search(np.ones((1, 1, 1, 4), np.float32), 1).values[0, 0, 0]
    np.testing.assert_allclose(found / largest, [[1, -1, 0.5, 0]], atol=0.005)


def test_nothing_is_left_to_fail_once_a_write_is_accepted(rng, monkeypatch):
    memory = make(rows=2)
    keys, values = segment(rng)
    memory.write(keys, values, tags=1)
    row = type(memory._rows[0])
    accepted = row.accept

    def accept(self, prepared):
        with monkeypatch.context() as patch:
            for name in ("full", "empty", "zeros"):  # no allocation
                patch.setattr(np, name, None)
            accepted(self, prepared)

    monkeypatch.setattr(row, "accept", accept)
    memory.write(keys, values)
    assert memory.search(keys, 1).tags.shape == (2, 2, 5, 1)
