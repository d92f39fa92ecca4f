"""top_k against a brute-force search in float64."""

from __future__ import annotations

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

import perdure


def brute_force(queries, keys, k, space):
    """Scores (q, n) one pair at a time, and the order of the k best with ties to the newest."""
    scores = np.empty((len(queries), len(keys)))
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            norms = np.linalg.norm(query) * np.linalg.norm(key)
            cosine = query @ key / norms if norms else 0.0
            scores[i, j] = {"ip": query @ key, "cosine": cosine, "l2": -np.sum((query - key) ** 2)}[space]
    order = [sorted(range(len(keys)), key=lambda j, row=row: (-row[j], -j))[:k] for row in scores]
    return scores, np.array(order, int).reshape(len(queries), -1)


@pytest.mark.parametrize("space", ["ip", "cosine", "l2"])
@given(data=st.data())
def test_top_k_is_a_brute_force_search(space, data):
    q, n, d, k = (data.draw(st.integers(1, high)) for high in (4, 30, 6, 35))
    queries, keys = data.draw(strategies.values((q, d))), data.draw(strategies.values((n, d)))
    scores, order = brute_force(queries, keys, k, space)
    near = perdure.top_k(queries, keys, k, space=space)
    best = np.take_along_axis(scores, order, axis=1)
    found = min(n, k)
    np.testing.assert_allclose(near.scores[:, :found], best, rtol=1e-9, atol=1e-9 * max(1, np.abs(scores).max()))
    assert (near.scores[:, found:] == -np.inf).all()
    assert (near.positions[:, found:] == -1).all()
    kept = near.positions[:, :found]
    np.testing.assert_allclose(np.take_along_axis(scores, kept, axis=1), near.scores[:, :found], rtol=1e-9, atol=1e-7)
    assert all(len(set(row)) == found for row in kept)


@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
def test_vectors_of_no_components_all_tie(backend):
    with perdure.backend(backend):
        near = perdure.top_k(np.ones((2, 0)), np.ones((3, 0)), k=2)
    assert near.positions.tolist() == [[2, 1], [2, 1]]
    assert (near.scores == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_distances_survive_a_common_offset(rng, offset):
    """|q|² - 2 q·k + |k|² in float32 loses everything at a mean of 1e3."""
    keys = (rng.standard_normal((200, 8)) + offset).astype("f")
    queries = (keys[:20] + 0.05 * rng.standard_normal((20, 8))).astype("f")
    near = perdure.top_k(queries, keys, 5, space="l2")
    _, order = brute_force(queries.astype(float), keys.astype(float), 5, "l2")
    assert np.mean(near.positions == order) > 0.99


def test_zero_vectors_have_cosine_zero_and_direction_survives_any_norm():
    keys = np.array([[1e-18, 0], [0, 0], [1e15, 1e15], [-1, 0]], "f")
    near = perdure.top_k(np.array([[1e-12, 0]], "f"), keys, 4, space="cosine")
    np.testing.assert_array_equal(near.positions, [[0, 2, 1, 3]])
    np.testing.assert_allclose(near.scores, [[1, np.sqrt(0.5), 0, -1]], rtol=1e-6)


def test_scores_have_gradients_and_positions_none():
    queries = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    for space in ("ip", "cosine", "l2"):
        assert torch.autograd.gradcheck(lambda q, k, s=space: perdure.top_k(q, k, 2, space=s).scores, (queries, keys))
    assert not perdure.top_k(queries, keys, 2).positions.requires_grad


@pytest.mark.parametrize(
    ("change", "argument", "error"),
    [
        ({"k": 0}, "k", perdure.ArgumentError),
        ({"k": 1.5}, "k", perdure.ArgumentError),
        ({"k": True}, "k", perdure.ArgumentError),
        ({"k": np.array([1, 2])}, "k", perdure.ArgumentError),
        ({"space": "euclid"}, "space", perdure.ArgumentError),
        ({"keys": np.ones((5, 4))}, "keys", perdure.ShapeError),
        ({"keys": np.ones((3, 5, 3)), "queries": np.ones((2, 4, 3))}, "keys", perdure.ShapeError),
        ({"keys": np.full((5, 3), np.nan)}, "keys", perdure.NonFiniteError),
        ({"queries": np.full((2, 3), np.inf)}, "queries", perdure.NonFiniteError),
        ({"keys": np.full((5, 3), 1e30, "f"), "queries": np.ones((2, 3), "f")}, "keys", perdure.NonFiniteError),
        ({"mask": np.ones((2, 4), bool)}, "mask", perdure.ShapeError),
    ],
)
def test_what_top_k_rejects(change, argument, error):
    arguments = {"queries": np.ones((2, 3)), "keys": np.ones((5, 3)), "k": 2}
    with pytest.raises(error) as caught:
        perdure.top_k(**(arguments | change))
    assert caught.value.argument == argument


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("run", ["numpy", "numba", "torch"])
def test_a_key_that_no_query_may_see_may_hold_anything(rng, run, poison):
    queries, keys = rng.standard_normal((3, 4)), rng.standard_normal((2, 6, 4))
    mask = np.array([True, False, True, True, False, True])
    clean = perdure.top_k(queries, keys, 9, mask=mask)
    keys[:, ~mask] = poison
    arrays = [torch.from_numpy(a) if run == "torch" else a for a in (queries, keys, mask)]
    with perdure.backend("numpy" if run == "torch" else run):
        near = perdure.top_k(*arrays[:2], 9, mask=arrays[2])
    np.testing.assert_array_equal(near.positions, clean.positions)
    np.testing.assert_allclose(near.scores, clean.scores)
