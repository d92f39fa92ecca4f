"""The Gibbs density on a rectangular basis against its definition, and the ridge that a signal asks for."""

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import perdure


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32))
def test_the_softmax_is_the_integral(n, q, seed):
    """Between two neighbours of a grid that holds every edge nothing varies, so midpoints integrate exactly."""
    rng = np.random.default_rng(seed)
    basis, energies = perdure.rectangular_basis(n), rng.standard_normal((2, q, n)) * 3
    signal = perdure.fit(rng.standard_normal((2, 4 * n, 3)), basis, ridge=1e-2)
    t = (np.arange(60 * n) + 0.5) / (60 * n)
    density = np.exp(energies @ basis(t).T)
    density /= density.mean(axis=-1, keepdims=True)
    assert np.allclose(perdure.gibbs_value(signal, energies), density @ signal(t) / t.size)
    edges = np.array([0, 0.2, 0.5, 1.0])
    mass = perdure.gibbs_mass(energies, basis, edges)
    for j in range(3):
        assert np.allclose(mass[..., j], (density * ((t > edges[j]) & (t < edges[j + 1]))).mean(-1))
    assert np.allclose(mass.sum(-1), 1)


def test_frameworks_and_gradients_agree(rng):
    x, energies = rng.standard_normal((12, 2)), rng.standard_normal((3, 4))
    basis = perdure.rectangular_basis(4)
    wanted = perdure.gibbs_value(perdure.fit(x, basis), energies)
    for convert in (torch.from_numpy, array_api_strict.asarray):
        got = perdure.gibbs_value(perdure.fit(convert(x), basis), convert(energies))
        assert type(got) is type(convert(x))
        assert np.allclose(np.asarray(got), wanted)
        mass = perdure.gibbs_mass(convert(energies), basis, [0, 0.5, 1])
        assert np.allclose(np.asarray(mass), perdure.gibbs_mass(energies, basis, [0, 0.5, 1]))
    leaves = torch.from_numpy(x).requires_grad_(), torch.from_numpy(energies).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, e: perdure.gibbs_value(perdure.fit(x, basis), e), leaves)
    assert torch.autograd.gradcheck(lambda e: perdure.gibbs_mass(e, basis, [0.1, 0.3, 0.9]), leaves[1])


def test_large_energies_find_one_bin():
    signal = perdure.fit(torch.arange(8, dtype=torch.float16)[:, None], perdure.rectangular_basis(8), ridge=0)
    seen = perdure.gibbs_value(signal, torch.eye(8, dtype=torch.float16) * 60_000)
    assert seen.dtype == torch.float16
    assert seen.flatten().tolist() == list(range(8))


@pytest.mark.parametrize(
    "call",
    [
        lambda: perdure.gibbs_value(perdure.fit(np.ones((4, 1)), perdure.gaussian_basis(4)), np.ones((1, 4))),
        lambda: perdure.gibbs_value(perdure.fit(np.ones((4, 1)), perdure.rectangular_basis(4)), np.ones((1, 3))),
        lambda: perdure.gibbs_value(
            perdure.fit(np.ones((4, 1)), perdure.rectangular_basis(4)), np.full((1, 4), np.nan)
        ),
        lambda: perdure.gibbs_value("signal", np.ones((1, 4))),
        lambda: perdure.gibbs_mass(np.ones((1, 4)), perdure.rectangular_basis(4), [0, 2]),
        lambda: perdure.gibbs_mass(np.ones((1, 4)), perdure.rectangular_basis(4), [1, 0.5]),
        lambda: perdure.gibbs_mass(np.ones((1, 4)), perdure.rectangular_basis(4), [[0.0, 1.0]]),
        lambda: perdure.gibbs_mass(np.ones((1, 4)), perdure.rectangular_basis(4), "a"),
        lambda: perdure.gibbs_mass(np.ones((1, 4)), "basis", [0, 1]),
        lambda: perdure.gibbs_mass([[1.0]], perdure.rectangular_basis(1), [0, 1]),
    ],
)
def test_bad_input_is_named(call):
    with pytest.raises(perdure.ArgumentError):
        call()


@pytest.mark.parametrize(("noise", "least", "most"), [(0.0, 0, 1e-3), (0.3, 1e-3, 10), (5.0, 0.1, 1e3)])
def test_cross_validation_follows_the_noise(noise, least, most):
    rng = np.random.default_rng(0)
    t = (np.arange(200) + 0.5) / 200
    clean = np.stack([np.sin(9 * t), np.cos(5 * t)], -1)
    x = clean + noise * rng.standard_normal(clean.shape)
    signal = perdure.fit(x, perdure.gaussian_basis(60), ridge="gcv")
    assert least <= signal.ridge <= most
    errors = [np.linalg.norm(perdure.fit(x, signal.basis, ridge=r)(t) - clean) for r in np.logspace(-6, 2, 17)]
    assert np.linalg.norm(signal(t) - clean) <= 1.3 * min(errors)


def test_cross_validation_scores_leave_one_out():
    """Of an orthogonal design with equal leverage the score is that of leaving out each sample in turn."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((12, 1)) + 2
    basis = perdure.rectangular_basis(4)
    ridge = perdure.fit(x, basis, ridge="gcv").ridge

    def left_out(r):
        bins = x.reshape(4, 3)
        lam = r * 3  # tr(F F^T)/N is the count a bin
        shrunk = (bins.sum(1, keepdims=True) - bins) / (2 + lam)
        return float(((bins - shrunk) ** 2).sum())

    assert left_out(ridge) <= min(left_out(r) for r in np.logspace(-6, 2, 200)) * (1 + 1e-3)


def test_other_words_are_no_ridge():
    with pytest.raises(perdure.ArgumentError):
        perdure.fit(np.ones((4, 1)), perdure.gaussian_basis(4), ridge="loo")
