"""Fitting signals, evaluating them, making them longer, and what they say they can hold."""

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure.backends.special import ranks
from perdure.core.basis import Basis, gaussian_basis, rectangular_basis
from perdure.core.positions import after_contraction, resample

import perdure


def smooth(rng, length, width, lead=(), features=4):
    """A random sum of a few low cosines, sampled at midpoints."""
    t = (np.arange(length) + 0.5) / length
    weights = rng.standard_normal((*lead, features, width))
    return np.cos(np.pi * t[:, None] * np.arange(features)) @ weights


@given(st.integers(1, 48), st.integers(1, 60), st.sampled_from([(), (2,), (1, 3)]), st.integers(0, 2**32))
@settings(max_examples=30)
def test_fit_minimises_the_penalised_squares(n, length, lead, seed):
    rng = np.random.default_rng(seed)
    x, t = rng.standard_normal((*lead, length, 3)), np.sort(rng.random(length))
    basis = gaussian_basis(n)
    signal = perdure.fit(x, basis, ridge=1e-2, positions=t)
    assert signal.coefficients.shape == (*lead, n, 3)
    F = basis(t)
    lam = 1e-2 * np.sum(F * F) / n
    gradient = F.T @ (F @ signal.coefficients - x) + lam * signal.coefficients
    assert np.abs(gradient).max() < 1e-9 * max(1, np.abs(F.T @ x).max())
    assert np.allclose(signal(t), F @ signal.coefficients)


def test_a_smooth_signal_is_recalled_anywhere():
    t = (np.arange(300) + 0.5) / 300
    signal = perdure.fit(np.stack([np.sin(7 * t), np.cos(3 * t)], -1), gaussian_basis(64), ridge=1e-4)
    at = np.linspace(0.02, 0.98, 77)
    assert np.allclose(signal(at), np.stack([np.sin(7 * at), np.cos(3 * at)], -1), atol=0.02)


def test_a_rectangular_fit_is_a_shrunken_mean():
    x = np.random.default_rng(0).standard_normal((64, 2))
    signal = perdure.fit(x, rectangular_basis(16), ridge=0.125)
    assert np.allclose(signal.coefficients, x.reshape(16, 4, 2).mean(1) * 4 / (4 + 0.125 * 4))


def test_constant_ends_and_single_samples():
    one = perdure.fit(np.full((1, 2), 3.0), gaussian_basis(8), ridge=1e-4)
    assert np.allclose(one([0.5]), 3.0, rtol=1e-3)
    assert one([]).shape == (0, 2)
    assert perdure.fit(np.zeros((5, 0)), gaussian_basis(8))([0.5]).shape == (1, 0)
    assert perdure.fit(np.zeros((0, 5, 2)), gaussian_basis(8))([0.5]).shape == (0, 1, 2)


@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.75, 0.9]))
@settings(max_examples=20)
def test_update_is_a_refit_to_old_and_new_samples(seed, tau):
    rng = np.random.default_rng(seed)
    basis, x, new = gaussian_basis(24), rng.standard_normal((2, 40, 3)), rng.standard_normal((2, 13, 3))
    signal = perdure.fit(x, basis)
    updated = signal.update(new, contraction=tau, samples=32)
    samples = np.concatenate([signal((np.arange(32) + 0.5) / 32), new], axis=1)
    t = np.concatenate(after_contraction(tau, 32, 13))
    assert np.allclose(updated.coefficients, perdure.fit(samples, basis, positions=t).coefficients, atol=1e-10)
    uniform = signal.update(new, contraction=tau, samples=32, where=np.ones(7))
    assert np.allclose(updated.coefficients, uniform.coefficients, atol=1e-10)


def test_sticky_update_looks_where_attention_fell():
    rng = np.random.default_rng(1)
    basis, x = gaussian_basis(48), smooth(rng, 128, 2, (2,), features=8)
    signal = perdure.fit(x, basis)
    histogram = np.zeros((2, 16))
    histogram[:, 4:8] = 1  # [.25, .5]
    updated = signal.update(smooth(rng, 32, 2, (2,)), samples=64, where=histogram, rng=np.random.default_rng(0))
    inside = np.linspace(0.1, 0.9, 20)
    wanted = signal(0.25 + 0.25 * inside)
    assert np.abs(updated(0.5 * inside) - wanted).max() < 0.02 * np.abs(wanted).max()


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32))
def test_systematic_resampling_keeps_the_shares(bins, samples, seed):
    rng = np.random.default_rng(seed)
    histogram = rng.random((3, bins)) * (rng.random((3, bins)) < 0.6)
    t = resample(histogram, samples, rng)
    assert t.shape == (3, samples)
    assert (np.diff(t, axis=-1) >= 0).all()
    assert ((t >= 0) & (t <= 1)).all()
    for row, p in zip(t, histogram, strict=True):
        p = p / p.sum() if p.sum() else np.full(bins, 1 / bins)
        counts = np.histogram(row, np.arange(bins + 1) / bins)[0]
        assert (np.abs(counts - p * samples) < 1 + 1e-9).all()


@given(st.integers(0, 9), st.integers(0, 20), st.sampled_from([(), (3,), (2, 2)]), st.integers(0, 2**32))
def test_ranks_count_what_is_at_most_each_value(size, values, lead, seed):
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, 5, (*lead, size)), axis=-1).astype(float)
    wanted = rng.integers(-1, 6, (*lead, values)).astype(float)
    counts = (wanted[..., None] >= ends[..., None, :]).sum(axis=-1)
    for convert in (np.asarray, torch.from_numpy, array_api_strict.asarray):
        assert np.array_equal(np.asarray(ranks(convert(ends), convert(wanted))), counts)


def test_update_leaves_the_signal_and_equal_seeds_agree():
    x = np.random.default_rng(0).standard_normal((20, 2))
    signal = perdure.fit(x, gaussian_basis(8))
    before = signal.coefficients.copy()
    a, b = (signal.update(x, where=np.arange(4.0), rng=np.random.default_rng(5)).coefficients for _ in range(2))
    assert np.array_equal(a, b)
    assert np.array_equal(before, signal.coefficients)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_agrees_and_keeps_the_dtype(dtype):
    x = torch.randn(2, 30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    signal = perdure.fit(x, gaussian_basis(12)).update(x, where=torch.ones(5))
    wanted = perdure.fit(x.double().numpy(), gaussian_basis(12)).update(x.double().numpy(), where=np.ones(5))
    got = signal([0.1, 0.5])
    assert got.dtype == x.dtype
    assert signal.coefficients.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    assert np.allclose(got.double().numpy(), wanted([0.1, 0.5]), atol=tolerance)


def test_the_formulas_need_only_the_standard():
    x = np.random.default_rng(0).standard_normal((2, 30, 3))
    signal = perdure.fit(array_api_strict.asarray(x), gaussian_basis(12))
    signal = signal.update(array_api_strict.asarray(x)).update(array_api_strict.asarray(x), where=np.ones(3))
    wanted = perdure.fit(x, gaussian_basis(12)).update(x).update(x, where=np.ones(3))
    got = signal(array_api_strict.asarray([0.25, 1.0]))
    assert isinstance(got, type(array_api_strict.asarray(x)))
    assert np.allclose(np.asarray(got), wanted([0.25, 1.0]))
    binned = perdure.fit(array_api_strict.asarray(x), rectangular_basis(4))
    assert np.allclose(np.asarray(binned([0.0, 1.0])), perdure.fit(x, rectangular_basis(4))([0.0, 1.0]))


def test_gradients_by_finite_differences():
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    new = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    t = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def through(x, new, t, where=None):
        return perdure.fit(x, gaussian_basis(6)).update(new, samples=8, where=where)(t)

    assert torch.autograd.gradcheck(through, (x, new, t))
    assert torch.autograd.gradcheck(lambda *a: through(*a, where=np.arange(1.0, 5.0)), (x, new, t))


@pytest.mark.parametrize("n", [128, 512, 1024])
def test_float32_keeps_to_float64(n):
    rng = np.random.default_rng(n)
    x = smooth(rng, 512, 4, features=32)
    exact = perdure.fit(x, gaussian_basis(n), ridge=1e-4)
    rounded = perdure.fit(x.astype(np.float32), gaussian_basis(n), ridge=1e-4)
    psi = exact.basis(np.linspace(0, 1, 99))
    assert rounded.coefficients.dtype == np.float32
    assert np.abs(psi @ (rounded.coefficients - exact.coefficients)).max() < 1e-5 * np.abs(x).max()


X = np.ones((4, 2))
BASIS = gaussian_basis(4)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (perdure.ShapeError, lambda: perdure.fit(np.ones((0, 2)), BASIS)),
        (perdure.ShapeError, lambda: perdure.fit(np.ones(3), BASIS)),
        (perdure.DTypeError, lambda: perdure.fit(np.ones((3, 2), int), BASIS)),
        (perdure.FrameworkError, lambda: perdure.fit([[1.0]], BASIS)),
        (perdure.NonFiniteError, lambda: perdure.fit(X * np.nan, BASIS)),
        (perdure.NonFiniteError, lambda: perdure.fit(X * np.inf, BASIS)),
        (perdure.ArgumentError, lambda: perdure.fit(X, 16)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS, ridge=-1)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS, ridge=float("nan"))),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS, ridge="some")),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS, positions=np.array([0, 0.2, 0.4, 1.1]))),
        (perdure.NonFiniteError, lambda: perdure.fit(X, BASIS, positions=np.array([0, 0.2, 0.4, np.nan]))),
        (perdure.ShapeError, lambda: perdure.fit(X, BASIS, positions=np.array([0, 0.2]))),
        (perdure.ArgumentError, lambda: perdure.fit(X, Basis([0.0], [0.01]))),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS)([1.5])),
        (perdure.DTypeError, lambda: perdure.fit(X, BASIS)(["a"])),
        (perdure.FrameworkError, lambda: perdure.fit(X, BASIS)(torch.ones(1))),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).update(X, contraction=0)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).update(X, contraction=1)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).update(X, contraction=None)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).update(X, samples=0)),
        (perdure.ShapeError, lambda: perdure.fit(X, BASIS).update(np.ones((4, 3)))),
        (perdure.ShapeError, lambda: perdure.fit(X, BASIS).update(np.ones((2, 4, 2)))),
        (perdure.ShapeError, lambda: perdure.fit(X, BASIS).update(np.ones((0, 2)))),
        (perdure.NonFiniteError, lambda: perdure.fit(X, BASIS).update(X * np.nan)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).update(X, where=-np.ones(3))),
        (perdure.ShapeError, lambda: perdure.fit(X, BASIS).update(X, where=np.ones((2, 3)))),
        (perdure.ShapeError, lambda: perdure.fit(X, BASIS).update(X, where=np.ones(0))),
        (perdure.DTypeError, lambda: perdure.fit(X, BASIS).update(X, where="a")),
        (perdure.DTypeError, lambda: perdure.fit(X, BASIS).update(X, where=[[1.0], [1.0, 2.0]])),
        (perdure.FrameworkError, lambda: perdure.fit(X, BASIS).update(torch.ones(4, 2, dtype=torch.float64))),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).update(X, where=np.ones(3), rng=3)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).update(X, rng=np.random.RandomState(0))),
        (perdure.DTypeError, lambda: perdure.fit(X, BASIS)(None)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS, ridge=1e308)),
        (perdure.ArgumentError, lambda: perdure.fit(X, Basis([0.0], [0.01]), ridge="gcv")),
        (perdure.DTypeError, lambda: perdure.fit(X, BASIS, positions="a")),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).report(segment=-1)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).report(features=0)),
        (perdure.ArgumentError, lambda: perdure.fit(X, BASIS).report(features=5, segment=4)),
        (perdure.ShapeError, lambda: perdure.fit(X[None], BASIS).update(X[None], where=np.ones((3, 8)))),
    ],
)
def test_bad_input_is_named(error, call):
    with pytest.raises(error):
        call()


def test_an_error_names_the_arguments_of_the_caller():
    with pytest.raises(perdure.FrameworkError, match="as x is"):
        perdure.fit(X, BASIS, positions=torch.linspace(0, 1, 4))
    with pytest.raises(perdure.FrameworkError, match="as signal is"):
        perdure.expected_value(perdure.fit(X, BASIS), torch.ones(1), 0.1)


def test_report_predicts_what_happens():
    rng = np.random.default_rng(3)
    basis = gaussian_basis(96)
    first = smooth(rng, 64, 400, features=4)
    signal = perdure.fit(np.zeros((64, 400)), basis).update(first, samples=128)
    report = signal.report(samples=128, features=4)
    t = 0.5 + 0.5 * (np.arange(64) + 0.5) / 64
    for age in range(4):
        measured = np.linalg.norm(signal(t) - first) / np.linalg.norm(first)
        assert np.isclose(measured, report.error_by_age[age], rtol=0.15)
        signal, t = signal.update(np.zeros((64, 400)), samples=128), t / 2
    assert (np.diff(report.error_by_age) > 0).all()
    assert report.horizon == 64 * int(np.argmax(report.error_by_age > 0.5))
    assert report.degrees_of_freedom <= 96
    assert not report.advice


def test_report_warns_of_wasted_functions():
    report = perdure.fit(X, gaussian_basis(256, 0.05)).report(segment=512)
    assert report.degrees_of_freedom < 128
    assert "256 functions" in str(report)


@pytest.mark.parametrize("length", [1, 3, 40])
def test_degrees_of_freedom_are_those_of_the_fit(rng, length):
    """tr(H) of x -> H x, taken from fits to unit samples, at positions of one's own."""
    basis, t = gaussian_basis(128), np.sort(rng.random(length))
    signal = perdure.fit(rng.standard_normal((length, 2)), basis, positions=t)
    smoothing = perdure.fit(np.eye(length), basis, positions=t)(t)
    assert np.isclose(signal.report().degrees_of_freedom, np.trace(smoothing))
    assert signal.report().degrees_of_freedom <= length
    updated = signal.update(np.ones((2, 2)))
    assert updated.report().degrees_of_freedom <= length + 2
    heap = perdure.fit(np.ones((length, 2)), basis, positions=np.full(length, 0.3))
    assert heap.report().degrees_of_freedom < 1.01  # all at one place


@pytest.mark.parametrize("scale", [4e153, 1e-200, 1e-310])  # squares still fit, their sum does not; or they are 0
def test_cross_validation_knows_no_scale(rng, scale):
    x = smooth(rng, 100, 2) + 0.1 * rng.standard_normal((100, 2))
    x /= np.abs(x).max()
    wanted = perdure.fit(x, gaussian_basis(24), ridge="gcv").ridge
    assert 1e-7 < wanted < 10
    assert np.isclose(perdure.fit(x * scale, gaussian_basis(24), ridge="gcv").ridge, wanted, rtol=1e-3)


def test_a_contraction_to_nothing_leaves_the_new_samples(rng):
    signal, new = perdure.fit(rng.standard_normal((40, 1)), gaussian_basis(24)), np.ones((40, 1))
    assert np.abs(signal.update(new, contraction=1e-320)(np.linspace(0.1, 0.9, 9)) - 1).max() < 0.05
