"""RecurrentMemory and CompressiveMemory against lists, and the five compressions against their definitions."""

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure.core.compression import layers_for
from perdure.memory.protocol import Memory

import perdure


def weights_for(method, rng, dim, rate):
    if method == "conv":
        return rng.standard_normal((dim, dim, rate)), rng.standard_normal(dim)
    if method == "dilated":
        layers = layers_for(rate)
        return rng.standard_normal((layers, dim, dim, 2)), rng.standard_normal((layers, dim))
    return ()


def by_definition(block, method, weights):
    """One block (c, d) -> (d,), in loops."""
    rate = len(block)
    if method == "mean":
        return sum(block) / rate
    if method == "max":
        return np.max(block, axis=0)
    kernel, bias = weights
    if method == "conv":
        return bias + sum(kernel[:, :, i] @ block[i] for i in range(rate))
    states = list(block)
    for layer in range(layers_for(rate)):
        past = [states[i - 2**layer] if i >= 2**layer else np.zeros_like(block[0]) for i in range(rate)]
        W = kernel[layer]
        states = [W[:, :, 0] @ p + W[:, :, 1] @ s + bias[layer] for p, s in zip(past, states, strict=True)]
        if layer < layers_for(rate) - 1:
            states = [np.maximum(s, 0) for s in states]
    return states[-1]


@pytest.mark.parametrize("method", ["mean", "max", "conv", "dilated"])
@pytest.mark.parametrize("rate", [1, 2, 3, 4, 7])
def test_compression_is_what_it_says(rng, method, rate):
    x, weights = rng.standard_normal((2, 3 * rate, 4)), weights_for(method, rng, 4, rate)
    got = perdure.compress(x, rate, method, weights)
    assert got.shape == (2, 3, 4)
    for row in range(2):
        for i in range(3):
            block = x[row, i * rate : (i + 1) * rate]
            assert np.allclose(got[row, i], by_definition(block, method, weights))
    for convert in (torch.from_numpy, array_api_strict.asarray):
        other = perdure.compress(convert(x), rate, method, tuple(convert(w) for w in weights))
        assert np.allclose(np.asarray(other), got)
    leaves = tuple(torch.from_numpy(a).requires_grad_() for a in (x, *weights) if a.size)
    if len(leaves) == 1 + len(weights):  # a block of one needs no dilated layer, so has no weights to differentiate by
        assert torch.autograd.gradcheck(lambda x, *w: perdure.compress(x, rate, method, w), leaves)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**32))
def test_the_most_used_stay_in_order(rate, blocks, seed):
    rng = np.random.default_rng(seed)
    usage = rng.integers(0, 3, (2, rate * blocks)).astype(float)
    x = np.broadcast_to(np.arange(rate * blocks, dtype=float)[:, None], (2, rate * blocks, 1))
    got = perdure.compress(x, rate, "most_used", usage=usage)
    for row in range(2):
        ranked = sorted(range(rate * blocks), key=lambda i: (-usage[row, i], -i))[:blocks]
        assert got[row, :, 0].tolist() == sorted(ranked)


METHODS = ["recurrent", "mean", "max", "conv", "dilated", "most_used"]


@pytest.mark.parametrize("method", METHODS)
@given(st.integers(0, 2**32))
@settings(max_examples=15)
def test_memories_are_lists(method, seed):
    """Any lengths, ragged, with clears, row subsets and reloads: the tail that is no whole block is neither dropped nor
    padded, and what is written never freezes what is read."""
    rng = np.random.default_rng(seed)
    rate, capacity, compressed, dim = int(rng.integers(1, 5)), int(rng.integers(1, 7)), int(rng.integers(1, 5)), 2
    weights = weights_for(method, rng, dim, rate)
    if method == "recurrent":
        memory, rate = perdure.RecurrentMemory(3, dim, capacity, dtype="float64"), 1
    else:
        memory = perdure.CompressiveMemory(3, dim, capacity, compressed, rate, method, weights=weights, dtype="float64")
    assert isinstance(memory, Memory)
    recent, used, older = ([[] for _ in range(3)] for _ in range(3))
    for _ in range(8):
        rows = rng.permutation(3)[: rng.integers(1, 4)].tolist()
        n = int(rng.integers(0, 13))
        x, mask = rng.standard_normal((len(rows), n, dim)), rng.random((len(rows), n)) < 0.7
        memory.write(x, rows=rows, mask=mask)
        for i, row in enumerate(rows):
            recent[row] += list(x[i][mask[i]])
            used[row] += [0.0] * int(mask[i].sum())
            leaving = max(len(recent[row]) - capacity, 0) // rate * rate
            gone, recent[row] = recent[row][:leaving], recent[row][leaving:]
            usage, used[row] = used[row][:leaving], used[row][leaving:]
            if method == "most_used":
                best = sorted(sorted(range(leaving), key=lambda j: (-usage[j], -j))[: leaving // rate])
                older[row] += [gone[j] for j in best]
            elif method != "recurrent":
                older[row] += [by_definition(gone[j : j + rate], method, weights) for j in range(0, leaving, rate)]
            older[row] = older[row][-compressed:]
        if method == "most_used":
            m = max(map(len, recent))
            mass = rng.random((3, m))
            memory.attended(mass)
            for row in range(3):
                used[row] = [u + w for u, w in zip(used[row], mass[row, m - len(used[row]) :], strict=True)]
        if rng.random() < 0.2:
            gone_row = int(rng.integers(3))
            memory.clear([gone_row])
            recent[gone_row], used[gone_row], older[gone_row] = [], [], []
        if rng.random() < 0.3:
            memory = type(memory).from_state_dict(memory.state_dict())
        seen = memory.read()
        for row in range(3):
            wanted = np.array(older[row] + recent[row]).reshape(-1, dim)
            assert np.allclose(seen.states[row][seen.mask[row]], wanted)
            assert not seen.states[row][~seen.mask[row]].any()
            assert memory.tokens[row] == len(recent[row]) + rate * len(older[row])


def test_frameworks_come_back_without_a_graph(rng):
    x = rng.standard_normal((2, 9, 3))
    for make in (
        lambda: perdure.RecurrentMemory(2, 3, 4, dtype="float64"),
        lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2, "max", dtype="float64"),
        lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2, "most_used", dtype="float64"),
    ):
        plain = make()
        plain.write(x)
        for convert in (torch.from_numpy, array_api_strict.asarray):
            memory = make()
            array = convert(x)
            memory.write(array.requires_grad_() if isinstance(array, torch.Tensor) else array)
            seen = memory.read()
            assert type(seen.states) is type(array)
            assert type(seen.mask) is type(array)
            assert np.array_equal(np.asarray(seen.states), plain.read().states)
        memory = make()
        memory.write(torch.from_numpy(x).requires_grad_())
        assert not memory.read().states.requires_grad
        before = memory.read().states.clone()
        memory.write(torch.from_numpy(x) + 1)
        assert not torch.equal(before, memory.read().states)  # later writes do not leave keys and values as they were


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_storage_dtypes_survive_saving(rng, dtype):
    for memory in (
        perdure.RecurrentMemory(2, 3, 4, dtype=dtype),
        perdure.CompressiveMemory(2, 3, 4, 2, 2, "mean", dtype=dtype),
    ):
        memory.write(rng.standard_normal((2, 9, 3)))
        assert str(memory.read().states.dtype) == dtype
        other = type(memory).from_state_dict({k: torch.from_numpy(v) for k, v in memory.state_dict().items()})
        for m in (memory, other):
            m.write(rng.standard_normal((2, 1, 3)) * 0 + 1)
        assert np.array_equal(memory.read().states, other.read().states)
        assert memory.nbytes == other.nbytes


X = np.ones((2, 4, 3))
NAN = np.full((3, 3, 2), np.nan), np.zeros(3)


@pytest.mark.parametrize(
    "make", [lambda: perdure.RecurrentMemory(2, 3, 4), lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2)]
)
@pytest.mark.parametrize(
    ("error", "call"),
    [
        (perdure.ShapeError, lambda m: m.write(X[:1])),
        (perdure.ShapeError, lambda m: m.write(X[..., :2])),
        (perdure.DTypeError, lambda m: m.write(X.astype(int))),
        (perdure.NonFiniteError, lambda m: m.write(X * np.nan)),
        (perdure.NonFiniteError, lambda m: m.write(X * 1e300)),
        (perdure.ArgumentError, lambda m: m.write(X, rows=[0, 0])),
        (perdure.ShapeError, lambda m: m.write(X, mask=np.ones((2, 3), bool))),
        (perdure.ArgumentError, lambda m: m.clear([2])),
        (perdure.ArgumentError, lambda m: m.from_state_dict({})),
        (perdure.ArgumentError, lambda m: m.from_state_dict(perdure.KNNMemory(1, 1, 1, 1).state_dict())),
    ],
)
def test_a_rejected_call_changes_nothing(rng, make, error, call):
    memory = make()
    memory.write(rng.standard_normal((2, 7, 3)))
    before = memory.state_dict()
    with pytest.raises(error):
        call(memory)
    after = memory.state_dict()
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (perdure.ArgumentError, lambda: perdure.RecurrentMemory(0, 3, 4)),
        (perdure.ArgumentError, lambda: perdure.RecurrentMemory(1, 3, 0)),
        (perdure.ArgumentError, lambda: perdure.RecurrentMemory(1, 3, 4, dtype="int8")),
        (perdure.ArgumentError, lambda: perdure.CompressiveMemory(1, 3, 4, 2, 0)),
        (perdure.ArgumentError, lambda: perdure.CompressiveMemory(1, 3, 4, 2, 2, "zip")),
        (perdure.ShapeError, lambda: perdure.CompressiveMemory(1, 3, 4, 2, 2, "conv")),
        (perdure.ShapeError, lambda: perdure.CompressiveMemory(1, 3, 4, 2, 2, "mean", weights=(X,))),
        (perdure.ShapeError, lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2).attended(np.ones((2, 9)))),
        (perdure.ArgumentError, lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2).attended(-np.ones((2, 4)))),
        (perdure.ArgumentError, lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2, "conv", weights="ab")),
        (perdure.FrameworkError, lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2, "conv", weights=([1.0], [1.0]))),
        (perdure.FrameworkError, lambda: perdure.compress(X, 2, "conv", weights=(None, None))),
        (perdure.ShapeError, lambda: perdure.compress(X, 3)),
        (perdure.ShapeError, lambda: perdure.compress(X, 2, "conv", (np.ones((3, 3, 3)), np.ones(3)))),
        (perdure.ArgumentError, lambda: perdure.compress(X, 2, "median")),
        (perdure.FrameworkError, lambda: perdure.compress([[1.0]], 1)),
        (perdure.ArgumentError, lambda: perdure.compress(X, 2, "most_used")),
        (perdure.ShapeError, lambda: perdure.compress(X, 2, "most_used", usage=np.ones((2, 3)))),
        (perdure.ShapeError, lambda: perdure.compress(X[0], 2, "most_used", usage=np.ones((2, 4)))),
        (perdure.ShapeError, lambda: perdure.compress(X, 2, "most_used", usage=np.ones((1, 2, 4)))),
        (perdure.ShapeError, lambda: perdure.compress(X, 2, "most_used", usage=np.ones((3, 4)))),
        (perdure.NonFiniteError, lambda: perdure.compress(X, 2, "most_used", usage=np.full((2, 4), np.nan))),
        (perdure.NonFiniteError, lambda: perdure.compress(X.astype(np.float32) * 3e38, 2)),
        (perdure.NonFiniteError, lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2, "conv", weights=NAN)),
    ],
)
def test_bad_input_is_named(error, call):
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("kernel", [np.nan, 1e38])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_summaries_that_are_not_finite_are_never_stored(rng, kernel, convert):
    memory = perdure.CompressiveMemory(2, 3, 4, 2, 2, "conv", weights=weights_for("conv", rng, 3, 2))
    memory.write(convert(rng.standard_normal((2, 9, 3))))
    good, before = memory.weights, memory.state_dict()
    memory.weights = np.full((3, 3, 2), kernel), np.zeros(3)
    with pytest.raises(perdure.NonFiniteError):
        memory.write(convert(np.full((2, 9, 3), 1e15)))
    memory.weights = good
    after = memory.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_half_precision_is_pooled_in_single():
    memory = perdure.CompressiveMemory(1, 1, 1, 1, 4, dtype="float16")
    memory.write(np.full((1, 5, 1), 6e4))  # four of which leave the range together
    assert np.allclose(memory.read().states[0, 0], 6e4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_may_be_wider_or_narrower_than_states(rng, dtype):
    x, weights = rng.standard_normal((4, 3)), weights_for("conv", rng, 3, 2)
    wanted = perdure.compress(x, 2, "conv", weights)
    for weight in (torch.float32, torch.float64):
        other = tuple(torch.from_numpy(w).to(weight) for w in weights)
        got = perdure.compress(torch.from_numpy(x).to(dtype), 2, "conv", other)
        assert got.dtype == dtype
        assert np.allclose(got.double().numpy(), wanted, atol=0.1)


@pytest.mark.parametrize(
    "make", [lambda: perdure.RecurrentMemory(2, 3, 4), lambda: perdure.CompressiveMemory(2, 3, 4, 2, 2)]
)
def test_no_rows_are_no_mistake(make):
    memory = make()
    memory.write(X)
    before = memory.state_dict()
    memory.write(X[:0], rows=[])
    memory.clear([])
    assert memory.read(rows=[]).states.shape == (0, 0, 3)
    after = memory.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
