"""Attention functions for CuPy: array-API code, run here on NumPy, PyTorch and a second device of array-api-strict."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import torch
from perdure.backends.exchange import to_numpy
from perdure.bindings.cupy import continuous_attention, memorizing_attention

import perdure

DEVICE = array_api_strict.Device("device1")
MAKERS = {
    "numpy": (np.asarray, None),
    "torch": (torch.from_numpy, torch.device("cpu")),
    "strict": (lambda a: array_api_strict.asarray(a, device=DEVICE), DEVICE),
}
each = pytest.mark.parametrize(("made", "device"), MAKERS.values(), ids=MAKERS)


def segments(rng, count=3, n=5):
    return [[rng.standard_normal((2, 2, n, d)) for d in (4, 4, 3)] for _ in range(count)]


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@each
def test_memory_and_segment_are_gated(made, device, rng):
    """With k as large as the memory: attention over all that came before, written out."""
    memory = perdure.KNNMemory(2, 2, 4, 100, value_dim=3, dtype="float64", device=device)
    bias, past = rng.standard_normal(2), []
    for q, k, v in segments(rng):
        output = memorizing_attention(*map(made, (q, k, v)), memory, made(bias), k=20)
        assert type(output) is type(made(q))
        visible = np.where(np.tri(5, dtype=bool), 0, -np.inf)
        local = softmax(q @ k.swapaxes(-1, -2) / 2 + visible) @ v
        expected = local
        if past:
            keys, values = (np.concatenate(parts, axis=2) for parts in zip(*past, strict=True))
            share = 1 / (1 + np.exp(-bias[:, None, None]))
            expected = share * (softmax(q @ keys.swapaxes(-1, -2) / 2) @ values) + (1 - share) * local
        np.testing.assert_allclose(to_numpy(output), expected, atol=1e-9)
        past.append((k, v))
    assert memory.tokens.tolist() == [15, 15]


@each
def test_padding_is_neither_seen_nor_remembered(made, device, rng):
    memory = perdure.KNNMemory(2, 2, 4, 100, value_dim=3, device=device)
    (q, k, v), *_ = segments(rng)
    mask, bias = np.array([[True] * 5, [True] * 3 + [False] * 2]), np.zeros(2)
    output = to_numpy(memorizing_attention(*map(made, (q, k, v)), memory, made(bias), mask=made(mask)))
    assert memory.tokens.tolist() == [5, 3]
    k[1, :, 3:], v[1, :, 3:] = 9, 9
    fresh = perdure.KNNMemory(2, 2, 4, 100, value_dim=3, device=device)
    again = to_numpy(memorizing_attention(*map(made, (q, k, v)), fresh, made(bias), mask=made(mask)))
    np.testing.assert_array_equal(output[1, :, :3], again[1, :, :3])


@each
def test_a_continuous_memory_is_read_and_kept_where_the_arrays_are(made, device, rng):
    memory = perdure.ContinuousMemory(rows=2, dim=6, basis=16, samples=32, dtype="float64")
    q, W_K, W_V = (rng.standard_normal(s) for s in ((2, 3, 5, 4), (3, 4, 6), (3, 7, 6)))
    maps, looked = rng.standard_normal((2, 16)), None
    for _ in range(3):
        memory.write(made(rng.standard_normal((2, 20, 6))), looked)
        output, looked = continuous_attention(made(q), memory, made(W_K), made(W_V), *map(made, maps))
    assert type(memory.signal.coefficients) is type(output)
    assert memory.signal.coefficients.device == output.device
    mean, variance = map(to_numpy, looked)
    B = to_numpy(memory.signal.coefficients)
    s = (q @ W_K) @ B[:, None].swapaxes(-1, -2) / 2
    np.testing.assert_allclose(mean, 1 / (1 + np.exp(-(s @ maps[0]))), atol=1e-9)
    np.testing.assert_allclose(variance, np.maximum(np.log1p(np.exp(s @ maps[1])), 1e-4), atol=1e-9)
    restored = perdure.ContinuousMemory.from_state_dict(memory.state_dict())
    seen = restored.read(mean, variance).output
    np.testing.assert_allclose(to_numpy(output), seen @ W_V.swapaxes(-1, -2), atol=1e-9)
    np.testing.assert_array_equal(restored.signal.coefficients, B)


def test_what_does_not_fit_is_named(rng):
    memory = perdure.ContinuousMemory(rows=2, dim=6, basis=16)
    arrays = [np.ones(s) for s in ((2, 3, 5, 4), (3, 4, 5), (3, 7, 6), (16,), (16,))]
    with pytest.raises(perdure.ShapeError, match=r"key_maps: expected shape \(3, 4, 6\)"):
        continuous_attention(arrays[0], memory, *arrays[1:])
