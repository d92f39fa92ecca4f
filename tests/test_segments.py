"""Columns of windows and segments against lists, and the relative positions, on NumPy and PyTorch alike."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from perdure.core.looking import affine, divergence, moments
from perdure.core.positions import resample, systematic
from perdure.core.relative import biased_attention, buckets, relative_scores, rotate, shifted_scores, sinusoids
from perdure.core.segments import numbers, slide, visible

import perdure

NAMESPACES = {"numpy": np.asarray, "torch": torch.as_tensor}
on_both = pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)


@on_both
@given(
    read=st.integers(0, 9), held=st.integers(0, 5), present=st.lists(st.booleans(), max_size=6),
    segment=st.integers(1, 4), reach=st.integers(0, 4),
)  # fmt: skip
def test_columns_are_the_tokens_a_list_says(xp, read, held, present, segment, reach):
    expected = [p if p >= 0 else None for p in range(read - held, read)]
    for real in present:
        expected.append(read if real else None)
        read += real
    position = xp(np.array([read - sum(present)]))
    tokens = numbers(position, held, len(present), xp(np.array([present], bool)))
    assert [p if p >= 0 else None for p in tokens[0].tolist()] == expected
    if all(present):
        assert numbers(position, held, len(present)).tolist() == tokens.tolist()
    seen = visible(tokens, len(present), segment, reach)[0].tolist()
    for i, row in enumerate(seen):
        query = expected[held + i]
        for j, key in enumerate(expected):
            near = None not in (query, key) and query // segment * segment - reach <= key <= query
            assert row[j] == (near or j == held + i)


@on_both
@given(held=st.integers(1, 5), present=st.lists(st.booleans(), max_size=6))
def test_a_window_keeps_the_newest_real_tokens(xp, held, present):
    old = xp(np.arange(held, dtype=float)[None, None, :, None])
    new = xp(100 + np.arange(len(present), dtype=float)[None, None, :, None])
    expected = [*range(held), *(100 + i for i, real in enumerate(present) if real)][-held:]
    assert slide(old, new, xp(np.array([present], bool)))[0, 0, :, 0].tolist() == expected
    if all(present):
        assert slide(old, new)[0, 0, :, 0].tolist() == expected


@on_both
def test_scores_shifted_are_scores_by_distance(xp, rng):
    queries, embeddings = xp(rng.standard_normal((2, 3, 4, 5))), xp(rng.standard_normal((3, 7, 5)))
    distances = np.arange(3, 7)[:, None] - np.arange(7)  # the last 4 of 7 tokens
    expected = np.asarray(relative_scores(queries, embeddings, xp(distances[None])))
    past = distances >= 0
    np.testing.assert_allclose(np.asarray(shifted_scores(queries, embeddings))[..., past], expected[..., past])


@on_both
def test_rotation_turns_scores_into_functions_of_distance(xp, rng):
    q, k = (xp(rng.standard_normal((1, 6))) for _ in range(2))
    scores = [float((rotate(q, xp(np.array([i + 4]))) * rotate(k, xp(np.array([i])))).sum()) for i in (0, 3, 50)]
    np.testing.assert_allclose(scores, scores[0])
    np.testing.assert_allclose(np.asarray(rotate(q, xp(np.array([0])))), np.asarray(q))


def test_rotation_of_half_precision_is_rounded_once():
    q = torch.randn(8, 6, dtype=torch.float64).bfloat16()
    far = torch.full((8,), 4097)  # which bfloat16 cannot hold
    torch.testing.assert_close(rotate(q, far), rotate(q.double(), far).bfloat16())


@on_both
def test_sinusoids_are_sines_then_cosines(xp):
    made = np.asarray(sinusoids(xp(np.array([0.0, 2.0])), 4))
    np.testing.assert_allclose(made, [[0, 0, 1, 1], [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]])


@on_both
def test_buckets_are_those_of_t5(xp):
    def one(distance):
        if distance < 16:
            return max(distance, 0)
        return min(16 + int(math.log(distance / 16) / math.log(128 / 16) * 16), 31)

    distances = [-3, 0, 1, 15, 16, 17, 20, 31, 40, 90, 127, 128, 1000]
    assert buckets(xp(np.array(distances))).tolist() == [one(d) for d in distances]


@on_both
def test_biased_attention_is_attention_with_a_bias(xp, rng):
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 3, 4), (2, 5, 4), (2, 5, 6)))
    bias, allowed = rng.standard_normal((2, 3, 5)), rng.random((2, 3, 5)) > 0.3
    allowed[0, 0] = False
    read = biased_attention(*map(xp, (q, k, v, bias)), 0.5, xp(allowed))
    scores = np.where(allowed, 0.5 * q @ k.swapaxes(1, 2) + bias, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
    np.testing.assert_allclose(np.asarray(read.lse), lse)
    weights = np.where(np.isfinite(lse)[..., None], np.exp(scores - np.where(np.isfinite(lse), lse, 0)[..., None]), 0)
    np.testing.assert_allclose(np.asarray(read.output), weights @ v)


@on_both
def test_where_queries_look(xp, rng):
    q, B, W_K = (rng.standard_normal(shape) for shape in ((2, 3, 4, 5), (2, 7, 6), (3, 5, 6)))
    w = rng.standard_normal((2, 7))
    basis = perdure.gaussian_basis(7)
    s = np.einsum("rhnd,rhNd->rhnN", q, np.einsum("rNe,hde->rhNd", B, W_K)) / math.sqrt(5)
    mean, variance = affine(*map(xp, (q, B, W_K, w[0], w[1])), 0.3)
    np.testing.assert_allclose(np.asarray(mean), 1 / (1 + np.exp(-s @ w[0])))
    np.testing.assert_allclose(np.asarray(variance), np.maximum(np.log1p(np.exp(s @ w[1])), 0.3))
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    mean, variance = moments(*map(xp, (q, B, W_K, basis.centers.copy(), basis.widths.copy())), 1e-6)
    np.testing.assert_allclose(np.asarray(mean), p @ basis.centers)
    spread = p @ (basis.widths**2 + basis.centers**2) - (p @ basis.centers) ** 2
    np.testing.assert_allclose(np.asarray(variance), np.maximum(spread, 1e-6))
    kl = divergence(xp(np.array([0.3])), xp(np.array([0.04])), 0.1, 0.5)
    np.testing.assert_allclose(np.asarray(kl), [math.log(0.1 / 0.2) + (0.04 + 0.04) / (2 * 0.01) - 0.5])


@on_both
def test_saturated_queries_have_finite_gradients_and_values(xp):
    far = xp(np.array([[[[1e4], [-1e4]]]]))
    one = xp(np.ones((1, 1, 1)))
    mean, variance = affine(far, one, one, xp(np.ones(1)), xp(np.ones(1)), 1e-4)
    np.testing.assert_allclose(np.asarray(mean), [[[1, 0]]])
    np.testing.assert_allclose(np.asarray(variance), [[[1e4, 1e-4]]])


@on_both
def test_systematic_positions_follow_the_mass(xp):
    mass = np.array([[0.0, 3.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    drawn = np.asarray(systematic(xp(mass), 8))
    assert ((drawn[0] >= 0.25) & (drawn[0] <= 0.5)).sum() == 6
    np.testing.assert_allclose(drawn[1], (np.arange(8) + 0.5) / 8)
    np.testing.assert_allclose(drawn, resample(mass, 8))
