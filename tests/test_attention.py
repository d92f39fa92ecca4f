"""attend, merge and gate: what the papers' equations say, and what must hold at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

import perdure


def softmax_attention(queries, keys, values, scale, mask):
    """The textbook in float64, one query at a time; None where it may attend to nothing."""
    for i, query in enumerate(queries):
        scores = [scale * float(query @ key) for key, allowed in zip(keys, mask[i], strict=True) if allowed]
        if not scores:
            yield np.zeros(values.shape[1]), -np.inf
            continue
        weights = np.exp(np.array(scores) - max(scores))
        yield weights / weights.sum() @ values[mask[i]], max(scores) + np.log(weights.sum())


@given(data=st.data())
def test_attend_is_the_textbook_softmax(data):
    q, n, d, dv = (data.draw(st.integers(1, 6)) for _ in range(4))
    queries, keys, values = (data.draw(strategies.values(shape)) for shape in ((q, d), (n, d), (n, dv)))
    mask = data.draw(strategies.masks((q, n)))
    reading = perdure.attend(queries, keys, values, scale=0.3, mask=mask)
    expected = list(softmax_attention(queries, keys, values, 0.3, mask))
    np.testing.assert_allclose(reading.output, [output for output, _ in expected], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(reading.lse, [lse for _, lse in expected], rtol=1e-9, atol=1e-9)


def test_scale_defaults_to_one_over_root_d(rng):
    queries, keys, values = rng.standard_normal((3, 16)), rng.standard_normal((5, 16)), rng.standard_normal((5, 2))
    default, explicit = perdure.attend(queries, keys, values), perdure.attend(queries, keys, values, scale=0.25)
    np.testing.assert_array_equal(default.output, explicit.output)
    assert np.abs(default.lse - perdure.attend(queries, keys, values, scale=1.0).lse).max() > 0.1


def test_neighbours_of_all_keys_are_all_keys(rng):
    queries, keys, values = (rng.standard_normal((2, 3, n, 8)) for n in (4, 10, 10))
    near = perdure.top_k(queries, keys, k=12)
    every, chosen = perdure.attend(queries, keys, values), perdure.attend(queries, keys, values, near.positions)
    np.testing.assert_allclose(every.output, chosen.output, atol=1e-12)
    np.testing.assert_allclose(every.lse, chosen.lse, atol=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_attend_to_is_zero_with_finite_gradients(n):
    queries = torch.ones(2, 3, requires_grad=True)
    keys, values = torch.ones(n, 3, requires_grad=True), torch.ones(n, 5, requires_grad=True)
    reading = perdure.attend(queries, keys, values, mask=torch.zeros(2, n, dtype=torch.bool))
    assert (reading.output == 0).all()
    assert (reading.lse == -torch.inf).all()
    gradients = torch.autograd.grad(reading.output.sum(), [queries, keys, values], allow_unused=True)
    assert all(g is None or (g == 0).all() for g in gradients)


def test_a_forbidden_value_cannot_leak_through_infinity(rng):
    """A masked key may score as high as it likes."""
    keys, values = np.array([[1.0], [1e6]]), np.array([[1.0], [np.finfo(float).max]])
    reading = perdure.attend(np.ones((1, 1)), keys, values, mask=np.array([[True, False]]))
    assert reading.output.item() == 1.0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("run", ["numpy", "numba", "torch", "torch-autograd"])
def test_what_no_query_may_see_may_hold_anything(rng, run, poison):
    """0 times NaN is NaN: forbidden keys and values have to be left out, not weighted with zero."""
    queries, keys, values = (rng.standard_normal((n, 4)) for n in (3, 6, 6))
    allowed = np.array([[False, True, True, False, True, True]] * 3)
    positions = np.array([[1, 2, -1], [4, -1, 5], [-1, -1, -1]])
    clean = [perdure.attend(queries, keys, values, mask=allowed), perdure.attend(queries, keys, values, positions)]
    keys[[0, 3]], values[[0, 3]] = poison, poison
    arrays = [queries, keys, values, positions, allowed]
    if run.startswith("torch"):
        arrays = [torch.from_numpy(a) for a in arrays]
        arrays[0].requires_grad_(run == "torch-autograd")
    queries, keys, values, positions, allowed = arrays
    with perdure.backend(run if run in ("numpy", "numba") else "numba"):
        read = [perdure.attend(queries, keys, values, mask=allowed), perdure.attend(queries, keys, values, positions)]
    for reading, expected in zip(read, clean, strict=True):
        np.testing.assert_allclose(
            reading.output.detach() if "torch" in run else reading.output, expected.output, atol=1e-12
        )
    if run == "torch-autograd":
        gradient = torch.autograd.grad(read[0].output.sum() + read[1].output.sum(), queries)[0]
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
def test_what_is_not_finite_is_told_by_every_backend(rng, backend):
    queries, keys, values = (rng.standard_normal((n, 4)).astype("f") for n in (3, 6, 6))
    keys[2, 1] = np.nan
    with perdure.backend(backend):
        for more in ({}, {"positions": np.array([[2, 1]] * 3)}, {"mask": np.eye(3, 6, dtype=bool)}):
            with pytest.raises(perdure.NonFiniteError, match="keys"):
                perdure.attend(queries, keys, values, **more)
        unseen = perdure.attend(queries, keys, values, np.array([[0, 1]] * 3))
        assert np.isfinite(unseen.output).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_positions_may_be_integers_of_any_kind(dtype):
    queries, keys = torch.eye(3), torch.arange(15.0).reshape(5, 3)
    positions = torch.tensor([[0, 4], [1, 2], [3, 3]])
    expected = perdure.attend(queries, keys, keys, positions)
    assert torch.equal(perdure.attend(queries, keys, keys, positions.to(dtype)).output, expected.output)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_leading_axes_of_every_argument_lead_the_reading(n):
    reading = perdure.attend(np.ones((3, 4)), np.ones((n, 4)), np.ones((2, n, 2)))
    assert reading.output.shape == (2, 3, 2)
    assert reading.lse.shape == (2, 3)
    assert perdure.merge(reading, reading).output.shape == (2, 3, 2)


@given(data=st.data())
def test_merging_parts_is_attending_to_the_whole(data):
    queries = data.draw(strategies.values((2, 5, 4)))
    keys, values = data.draw(strategies.values((2, 9, 4))), data.draw(strategies.values((2, 9, 3)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    bounds = list(zip([0, *cuts], [*cuts, 9], strict=True))
    parts = [perdure.attend(queries, keys[:, a:b], values[:, a:b]) for a, b in bounds]
    merged, whole = perdure.merge(*parts), perdure.attend(queries, keys, values)
    np.testing.assert_allclose(merged.output, whole.output, rtol=1e-9, atol=1e-9 * np.abs(values).max(initial=1))
    np.testing.assert_allclose(merged.lse, whole.lse, rtol=1e-9, atol=1e-9)


def test_attend_merge_and_gate_have_the_gradients_of_their_formulas():
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 3, -1], [4, 1, 2], [-1, -1, -1], [2, 2, 0]]).expand(2, 4, 3)

    def mixed(queries, keys, values, bias):
        near = perdure.attend(queries, keys, values, positions)
        local = perdure.attend(queries, values, keys)
        both = perdure.merge(near, local)
        return perdure.gate(near, both.output, bias), both.lse

    assert torch.autograd.gradcheck(mixed, (queries, keys, values, bias))


def test_gate_mixes_by_the_sigmoid_and_keeps_local_where_memory_is_empty(rng):
    memory, local, bias = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4)), np.array([0.0, 2.0])
    share = (1 / (1 + np.exp(-bias)))[:, None, None]
    expected = share * memory + (1 - share) * local
    np.testing.assert_allclose(perdure.gate(memory, local, bias), expected, atol=1e-12)
    lse = np.zeros((2, 3))
    lse[0, 1] = -np.inf
    mixed = perdure.gate(perdure.Reading(memory, lse), local, bias)
    np.testing.assert_array_equal(mixed[0, 1], local[0, 1])
    np.testing.assert_allclose(mixed[1], expected[1], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "argument", "error"),
    [
        ({"keys": np.ones((5, 4))}, "keys", perdure.ShapeError),
        ({"values": np.ones((4, 2))}, "values", perdure.ShapeError),
        ({"queries": np.ones(3)}, "queries", perdure.ShapeError),
        ({"queries": np.ones((2, 3), int)}, "queries", perdure.DTypeError),
        ({"queries": [[1.0, 2.0, 3.0]]}, "queries", perdure.FrameworkError),
        ({"keys": torch.ones(5, 3)}, "keys", perdure.FrameworkError),
        ({"positions": np.ones((2, 2))}, "positions", perdure.DTypeError),
        ({"positions": np.ones((3, 2), int)}, "positions", perdure.ShapeError),
        ({"positions": np.full((2, 2), 5)}, "positions", perdure.ArgumentError),
        ({"positions": np.full((2, 2), -2)}, "positions", perdure.ArgumentError),
        ({"mask": np.ones((2, 5))}, "mask", perdure.DTypeError),
        ({"mask": np.ones((3, 5), bool)}, "mask", perdure.ShapeError),
        ({"positions": [[0], [1]]}, "positions", perdure.FrameworkError),
        ({"positions": torch.zeros(2, 1, dtype=torch.int64)}, "positions", perdure.FrameworkError),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, "mask", perdure.FrameworkError),
        ({"keys": np.full((5, 3), np.nan)}, "keys", perdure.NonFiniteError),
        ({"queries": np.full((2, 3), -np.inf)}, "queries", perdure.NonFiniteError),
        ({"values": np.full((5, 2), np.inf)}, "values", perdure.NonFiniteError),
        ({"queries": np.full((2, 3), 1e200), "keys": np.full((5, 3), 1e200)}, "queries", perdure.NonFiniteError),
        ({"scale": np.nan}, "scale", perdure.ArgumentError),
        ({"scale": "x"}, "scale", perdure.ArgumentError),
    ],
)
def test_what_attend_rejects(change, argument, error):
    arguments = {"queries": np.ones((2, 3)), "keys": np.ones((5, 3)), "values": np.ones((5, 2))}
    with pytest.raises(error) as caught:
        perdure.attend(**(arguments | change))
    assert caught.value.argument == argument


@pytest.mark.parametrize("framework", [np.asarray, torch.tensor])
def test_what_an_empty_reading_holds_does_not_count(framework):
    output, lse = framework([[2.0, 3.0]]), framework([0.0])
    nothing = perdure.Reading(framework([[np.nan, np.inf]]), framework([-np.inf]))
    for readings in ((perdure.Reading(output, lse), nothing), (nothing, perdure.Reading(output, lse))):
        both = perdure.merge(*readings)
        np.testing.assert_array_equal(np.asarray(both.output), [[2, 3]])
        np.testing.assert_array_equal(np.asarray(both.lse), [0])
    empty = perdure.merge(nothing, nothing)
    np.testing.assert_array_equal(np.asarray(empty.output), [[0, 0]])
    local = framework([[[5.0, 6.0]]])
    mixed = perdure.gate(perdure.Reading(nothing.output[None], nothing.lse[None]), local, framework([0.0]))
    np.testing.assert_array_equal(np.asarray(mixed), np.asarray(local))
    for bad in (np.nan, np.inf):
        with pytest.raises(perdure.NonFiniteError, match=r"readings\[1\].lse"):
            perdure.merge(perdure.Reading(output, lse), perdure.Reading(output, framework([bad])))


def test_what_merge_and_gate_reject():
    reading = perdure.attend(np.ones((2, 3)), np.ones((5, 3)), np.ones((5, 2)))
    with pytest.raises(perdure.ArgumentError, match="readings"):
        perdure.merge()
    with pytest.raises(perdure.ArgumentError, match="Reading"):
        perdure.merge(reading, reading.output)
    with pytest.raises(perdure.ShapeError, match="output"):
        perdure.merge(reading, perdure.Reading(reading.output[:1], reading.lse[:1]))
    with pytest.raises(perdure.FrameworkError, match="lse"):
        perdure.merge(reading, perdure.Reading(reading.output, torch.zeros(2)))
    with pytest.raises(perdure.ShapeError, match="lse"):
        perdure.gate(perdure.Reading(np.ones((2, 3, 4)), np.ones(3)), np.ones((2, 3, 4)), np.zeros(2))
    with pytest.raises(perdure.ShapeError, match="bias"):
        perdure.gate(np.ones((2, 3, 4)), np.ones((2, 3, 4)), np.zeros((5, 2)))
    with pytest.raises(perdure.ShapeError, match="bias"):
        perdure.gate(np.ones((2, 3, 4)), np.ones((2, 3, 4)), np.zeros(3))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_what_pytorch_fuses_is_attention_with_its_log_sum_exp(rng, dtype):
    """With and without a causal mask, keys shared by several heads, and heads whose vectors lie apart in memory."""
    from perdure.backends.torch import fused

    made = (torch.from_numpy(rng.standard_normal((2, 7, heads, 8))).transpose(1, 2) for heads in (6, 2, 2))
    queries, keys, values = (a.to(getattr(torch, dtype)) for a in made)
    queries, keys, values = queries.unflatten(1, (2, 3)), keys[:, :, None], values[:, :, None]
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    for causal in (False, True):
        mask = torch.ones(7, 7, dtype=torch.bool).tril() if causal else None
        whole = perdure.attend(queries.double(), keys.double(), values.double(), scale=0.5, mask=mask)
        output, lse = fused(queries, keys, values, 0.5, None, causal)
        torch.testing.assert_close(output.double(), whole.output, **close)
        torch.testing.assert_close(lse.double(), whole.lse, **close)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # raised inside PyTorch
def test_merging_has_derivatives_of_forward_mode(rng):
    outputs, lses = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((2, 3, 4), (2, 3)))
    tangent = torch.ones_like(lses[0])

    def merged(lse):
        return perdure.merge(perdure.Reading(outputs[0], lse), perdure.Reading(outputs[1], lses[1])).output

    with torch.autograd.forward_ad.dual_level():
        dual = merged(torch.autograd.forward_ad.make_dual(lses[0], tangent))
        told = torch.autograd.forward_ad.unpack_dual(dual).tangent
    step = 1e-6
    expected = (merged(lses[0] + step) - merged(lses[0] - step)) / (2 * step)
    torch.testing.assert_close(told, expected, rtol=1e-6, atol=1e-8)
