"""Densities against quadrature, finite differences and SciPy."""

import itertools

import array_api_strict
import numpy as np
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure.core.basis import gaussian_basis, rectangular_basis
from perdure.core.density import expected_basis, half_width, interval_mass, mass
from scipy import integrate, stats

import perdure

NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)


def pdf(t, mean, variance, density):
    """The density as its definition has it."""
    if density == "gaussian":
        return stats.norm.pdf(t, mean, np.sqrt(variance))
    if density == "truncated_gaussian":
        s = np.sqrt(variance)
        return stats.truncnorm.pdf(t, -mean / s, (1 - mean) / s, mean, s)
    a = half_width(variance, density)
    parabola = np.maximum(a * a - (t - mean) ** 2, 0)
    return parabola / (2 * variance) if density == "sparsemax" else (parabola / (4 * variance)) ** 2


def support(mean, variance, density):
    if density == "gaussian":
        return mean - 12 * np.sqrt(variance), mean + 12 * np.sqrt(variance)
    if density == "truncated_gaussian":
        return max(0, mean - 12 * np.sqrt(variance)), min(1, mean + 12 * np.sqrt(variance))
    a = half_width(variance, density)
    return mean - a, mean + a


def quadrature(function, low, high, breaks):
    """Gauss-Legendre over pieces that are narrow beside everything that varies."""
    cuts = np.unique(np.clip(np.append(breaks, [low, high]), low, high))
    total = 0.0
    for a, b in itertools.pairwise(cuts):
        total += (b - a) / 2 * np.sum(WEIGHTS * function((a + b) / 2 + (b - a) / 2 * NODES))
    return total


@given(strategies.args_expected_basis())
@settings(max_examples=60, deadline=None)
def test_expected_basis_is_the_integral(args):
    mean, variance, centers, widths, density = args
    results = []
    for name in ("numpy", "numba"):
        with perdure.backend(name):
            results.append(expected_basis(*args).reshape(-1, centers.size)[0])
    m, s2 = mean.reshape(-1)[0], variance.reshape(-1)[0]
    low, high = support(m, s2, density)
    for j, (mu, sigma) in enumerate(zip(centers, widths, strict=True)):
        breaks = np.concatenate([mu + sigma * np.arange(-12, 13), m + np.sqrt(s2) * np.arange(-12, 13)])
        wanted = quadrature(
            lambda t, mu=mu, sigma=sigma: pdf(t, m, s2, density) * stats.norm.pdf(t, mu, sigma), low, high, breaks
        )
        for result in results:
            assert abs(result[j] - wanted) < 1e-9 / sigma


@given(strategies.args_interval_mass())
@settings(max_examples=60, deadline=None)
def test_interval_mass_is_the_integral(args):
    mean, variance, edges, density = args
    result = interval_mass(*args).reshape(-1, edges.size - 1)[0]
    m, s2 = mean.reshape(-1)[0], variance.reshape(-1)[0]
    low, high = support(m, s2, density)
    for j in range(edges.size - 1):
        a, b = np.clip(edges[j : j + 2], low, high)
        breaks = m + np.sqrt(s2) * np.arange(-12, 13)
        assert abs(result[j] - quadrature(lambda t: pdf(t, m, s2, density), a, b, breaks)) < 1e-9


@pytest.mark.parametrize("density", strategies.DENSITIES)
def test_densities_have_mass_one(density):
    mean, variance = np.array([0.2, 0.5]), np.array([1e-3, 1e-2])
    edges = np.array([0.0, 1.0] if density == "truncated_gaussian" else [-5.0, 6.0])
    whole = interval_mass(mean, variance, edges, density)
    assert np.allclose(whole, 1)


@pytest.mark.parametrize("density", strategies.DENSITIES)
@pytest.mark.parametrize("variance", [1e-5, 1e-3, 0.02, 0.7])
def test_gradients_by_finite_differences(density, variance):
    signal = perdure.fit(torch.randn(20, 2, dtype=torch.float64), gaussian_basis(10))
    mean = torch.tensor([0.0, 0.31, 0.5, 0.97], dtype=torch.float64).clamp(1e-5, 1 - 1e-5).requires_grad_()
    spread = torch.full((4,), variance, dtype=torch.float64, requires_grad=True)
    step = 1e-6 * min(variance**0.5, 1)

    def look(m, v):
        return perdure.expected_value(signal, m, v, density)

    look(mean, spread).sum().backward()
    with torch.no_grad():
        for argument, by in ((mean, step), (spread, 1e-4 * variance)):
            moved = [look(*(a + sign * by if a is argument else a for a in (mean, spread))).sum(-1) for sign in (1, -1)]
            numeric = (moved[0] - moved[1]) / (2 * by)
            assert torch.allclose(argument.grad, numeric, rtol=1e-4, atol=1e-4 * float(numeric.abs().max()))


@pytest.mark.parametrize("density", strategies.DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variance", [1e-38, 1e-7, 1.0, 1e4])
def test_extreme_variances_stay_finite(density, dtype, variance):
    variance = max(variance, float(torch.finfo(dtype).smallest_normal))
    signal = perdure.fit(torch.ones(30, 1, dtype=dtype), gaussian_basis(16), ridge=1e-4)
    mean = torch.tensor([0.0, 0.4, 1.0], dtype=dtype, requires_grad=True)
    spread = torch.full((3,), variance, dtype=dtype, requires_grad=True)
    seen = perdure.expected_value(signal, mean, spread, density)
    assert seen.dtype == dtype
    seen.sum().backward()
    for values in (seen, mean.grad, spread.grad):
        assert torch.isfinite(values).all()
    if variance < 1e-4:
        assert torch.allclose(seen[1], torch.ones((), dtype=dtype), rtol=1e-2)
    if density == "truncated_gaussian":
        assert torch.allclose(seen, torch.ones((), dtype=dtype), atol=0.1)


@pytest.mark.parametrize("density", strategies.DENSITIES)
def test_rectangular_basis_sees_interval_means(density):
    signal = perdure.fit(np.arange(8.0)[:, None], rectangular_basis(8), ridge=0.0)
    mean, variance = np.array([0.3, 0.8]), np.array([0.01, 0.001])
    wanted = mass(mean, variance, np.linspace(0, 1, 9), density) @ np.arange(8.0)[:, None]
    assert np.allclose(perdure.expected_value(signal, mean, variance, density), wanted)


@pytest.mark.parametrize("density", strategies.DENSITIES)
def test_every_framework_agrees(density):
    rng = np.random.default_rng(0)
    x, mean, variance = rng.standard_normal((2, 1, 20, 3)), rng.random((2, 4, 5)), rng.random((2, 4, 5)) * 0.1 + 1e-4
    wanted = perdure.expected_value(perdure.fit(x, gaussian_basis(8)), mean, variance, density)
    assert wanted.shape == (2, 4, 5, 3)
    for convert in (torch.from_numpy, array_api_strict.asarray):
        signal = perdure.fit(convert(x), gaussian_basis(8))
        got = perdure.expected_value(signal, convert(mean), convert(variance), density)
        assert type(got) is type(convert(x))
        assert np.allclose(np.asarray(got), wanted, atol=1e-10)


def test_narrow_density_sees_the_signal_itself():
    signal = perdure.fit(np.sin(np.linspace(0, 5, 90))[:, None], gaussian_basis(24))
    t = np.linspace(0.05, 0.95, 7)
    for density in strategies.DENSITIES:
        assert np.allclose(perdure.expected_value(signal, t, 1e-10, density), signal(t), atol=1e-5)


def test_truncated_tail_by_scipy():
    value, _ = integrate.quad(lambda t: pdf(t, 0.02, 0.09, "truncated_gaussian") * stats.norm.pdf(t, 0.1, 0.05), 0, 1)
    got = expected_basis(*(np.array([v]) for v in (0.02, 0.09, 0.1, 0.05)), "truncated_gaussian")
    assert np.isclose(got.item(), value, rtol=1e-9)


SIGNAL = perdure.fit(np.ones((4, 2)), gaussian_basis(4))
HALF = np.array([0.5])


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (perdure.ArgumentError, lambda: perdure.expected_value("signal", HALF, HALF)),
        (perdure.ArgumentError, lambda: perdure.expected_value(SIGNAL, HALF, HALF, density="cauchy")),
        (perdure.ArgumentError, lambda: perdure.expected_value(SIGNAL, HALF + 1, HALF)),
        (perdure.NonFiniteError, lambda: perdure.expected_value(SIGNAL, HALF * np.nan, HALF)),
        (perdure.ArgumentError, lambda: perdure.expected_value(SIGNAL, HALF, 0 * HALF)),
        (perdure.ArgumentError, lambda: perdure.expected_value(SIGNAL, HALF, -HALF)),
        (perdure.ArgumentError, lambda: perdure.expected_value(SIGNAL, HALF, HALF * np.nan)),
        (perdure.ArgumentError, lambda: perdure.expected_value(SIGNAL, HALF, HALF * np.inf)),
        (perdure.ShapeError, lambda: perdure.expected_value(SIGNAL, np.array(0.5), HALF)),
        (perdure.ShapeError, lambda: perdure.expected_value(SIGNAL, np.full(3, 0.5), np.full(2, 0.5))),
        (perdure.DTypeError, lambda: perdure.expected_value(SIGNAL, np.array([1]), HALF)),
        (perdure.DTypeError, lambda: perdure.expected_value(SIGNAL, HALF, "a")),
        (perdure.DTypeError, lambda: perdure.expected_value(SIGNAL, HALF, None)),
        (perdure.ShapeError, lambda: perdure.expected_value(SIGNAL, np.full(3, 0.5), [0.1, 0.2])),
        (perdure.DTypeError, lambda: perdure.expected_value(SIGNAL, "a", HALF)),
        (perdure.ArgumentError, lambda: perdure.expected_value(SIGNAL, HALF, HALF, density=np.ones(2))),
        (perdure.FrameworkError, lambda: perdure.mass([0.5], HALF, [0, 1])),
        (perdure.DTypeError, lambda: perdure.mass(HALF, HALF, "a")),
        (perdure.ArgumentError, lambda: perdure.mass(HALF, HALF, [0.0])),
        (perdure.ArgumentError, lambda: perdure.mass(HALF, HALF, [0, 0.5, 0.2])),
        (perdure.ShapeError, lambda: perdure.mass(HALF, HALF, [[0.0, 1.0]])),
        (perdure.FrameworkError, lambda: perdure.expected_value(SIGNAL, torch.tensor([0.5]), HALF)),
        (perdure.FrameworkError, lambda: perdure.expected_value(SIGNAL, HALF, torch.tensor([0.5]))),
    ],
)
def test_bad_input_is_named(error, call):
    with pytest.raises(error):
        call()


@given(st.floats(0, 1), st.floats(1e-6, 4))
def test_nothing_touches_its_inputs(m, v):
    mean, variance = np.array([m]), np.array([v])
    perdure.expected_value(SIGNAL, mean, variance)
    assert mean[0] == m
    assert variance[0] == v
