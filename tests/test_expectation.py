"""Wide densities see a signal through fewer places than it has functions, and see the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure.core.basis import Basis, gaussian_basis, rectangular_basis
from perdure.core.density import expected_basis
from perdure.core.expectation import fewer_places

import perdure

GAUSSIANS = ("gaussian", "truncated_gaussian")
ROUNDED = {"float32": 2e-6, "float64": 2e-14}


def bases(rng):
    """Ordered and not, inside [0, 1] and around it, of one width and of many."""
    yield gaussian_basis(200)
    yield gaussian_basis(160, [0.02, 0.04])
    yield Basis(rng.uniform(-0.5, 1.5, 150), rng.uniform(0.01, 0.2, 150))


@given(st.integers(0, 2**32), st.sampled_from(GAUSSIANS), st.floats(-2, 30), st.sampled_from(sorted(ROUNDED)))
@settings(max_examples=40)
def test_what_is_seen_through_few_places_is_the_same(seed, density, power, dtype):
    rng = np.random.default_rng(seed)
    least = 10.0**power
    mean = np.append(rng.random(30), [0, 1, 0.5]).astype(dtype)
    variance = np.append(np.exp(rng.uniform(0, 5, 32)), 1).astype(dtype) * np.asarray(least, dtype)
    for basis in bases(rng):
        few = fewer_places(basis, variance, density, 10**6)
        if few is None:
            continue
        B = rng.standard_normal((2, len(basis), 3)).astype(dtype)
        wide = mean.astype(float), variance.astype(float)
        dense = expected_basis.formula(*wide, basis.centers, basis.widths, density)
        error = np.abs(few.seen(mean, variance) @ few.blurred(B) - dense @ B)
        assert (error <= ROUNDED[dtype] * (dense @ np.abs(B)) + 1e-300).all()
        assert few.seen(mean, variance).dtype == few.blurred(B).dtype == dtype
        assert few.matrix.shape[0] <= len(basis) / 2


@pytest.mark.parametrize("density", GAUSSIANS)
def test_values_and_gradients_are_those_of_all_functions(density):
    rng = np.random.default_rng(0)
    x, mean, variance = rng.standard_normal((2, 300, 3)), rng.random((2, 400)), rng.uniform(0.05, 0.5, (2, 400))
    signal = perdure.fit(x, gaussian_basis(256))
    assert fewer_places(signal.basis, variance, density, 400) is not None
    seen = expected_basis.formula(mean, variance, signal.basis.centers, signal.basis.widths, density)
    assert np.allclose(perdure.expected_value(signal, mean, variance, density), seen @ signal.coefficients, atol=1e-12)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, mean, variance)]
    torch_signal = perdure.fit(leaves[0], signal.basis)
    weights = torch.from_numpy(rng.standard_normal((2, 400, 3)))
    got = torch.autograd.grad((weights * perdure.expected_value(torch_signal, *leaves[1:], density)).sum(), leaves)
    torch_signal = perdure.fit(leaves[0], signal.basis)
    psi = expected_basis.formula(*leaves[1:], *signal.basis.beside(leaves[1]), density)
    wanted = torch.autograd.grad((weights * (psi @ torch_signal.coefficients)).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_one_narrow_density_is_seen_by_all_functions():
    basis, wide = gaussian_basis(256), np.full(400, 0.1)
    assert fewer_places(basis, wide, "gaussian", 400) is not None
    narrow = np.append(wide, 1e-8)
    signal = perdure.fit(np.random.default_rng(0).standard_normal((300, 2)), basis)
    assert fewer_places(basis, narrow, "gaussian", 401) is None
    assert np.allclose(perdure.expected_value(signal, np.full(401, 0.3), narrow)[-1], signal([0.3])[0], rtol=1e-3)


def test_no_detour_where_it_gains_nothing():
    wide = np.full(400, 0.1)
    assert fewer_places(gaussian_basis(256), wide, "gaussian", 1) is None  # blurring costs more than one look
    assert fewer_places(gaussian_basis(16), wide, "gaussian", 400) is None
    assert fewer_places(gaussian_basis(256), wide, "sparsemax", 400) is None
    assert fewer_places(gaussian_basis(256), wide[:0], "gaussian", 400) is None
    assert fewer_places(rectangular_basis(256), wide, "gaussian", 400) is None
    assert fewer_places(gaussian_basis(256), wide * np.nan, "gaussian", 400) is None
    for extreme in (5e-324, 1e308, np.inf):
        fewer_places(gaussian_basis(256), np.full(3, extreme), "truncated_gaussian", 400)
