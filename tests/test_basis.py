"""Basis functions: values, constructors, the fit operator and its cache."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from perdure.core import ridge
from perdure.core.basis import Basis, gaussian_basis, gaussians, rectangular_basis
from perdure.core.consolidation import Scheme
from perdure.core.positions import centred
from scipy import linalg, stats

import perdure


@given(strategies.args_gaussians())
def test_gaussians_are_normal_densities(args):
    t, centers, widths = args
    wanted = stats.norm.pdf(t[:, None], centers, widths)
    for name in ("numpy", "numba"):
        with perdure.backend(name):
            assert np.allclose(gaussians(*args), wanted, rtol=1e-12, atol=1e-12 / widths.min())


@given(st.integers(1, 40), strategies.places())
def test_rectangles_tile_the_unit_interval(n, t):
    psi = rectangular_basis(n)(t)
    assert psi.shape == (t.size, n)
    assert np.array_equal(psi.sum(axis=1), np.ones(t.size))
    assert np.array_equal(np.argmax(psi, axis=1), np.searchsorted(rectangular_basis(n).edges[1:-1], t, side="right"))


def test_two_widths_are_interleaved():
    basis = gaussian_basis(6, [0.2, 0.5])
    assert basis.centers.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert basis.widths.tolist() == [0.2, 0.5] * 3
    assert basis == gaussian_basis(6, (0.2, 0.5))
    assert hash(basis) == hash(gaussian_basis(6, (0.2, 0.5)))
    assert basis != gaussian_basis(6, (0.2, 0.4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: gaussian_basis(0),
        lambda: gaussian_basis(-3),
        lambda: gaussian_basis(2.5),
        lambda: gaussian_basis(5, [0.3, 0.5]),
        lambda: gaussian_basis(8, 0.05),
        lambda: gaussian_basis(8, -1.0),
        lambda: gaussian_basis(8, float("nan")),
        lambda: gaussian_basis(8, []),
        lambda: rectangular_basis(0),
        lambda: Basis([0.5], [0.0]),
        lambda: Basis([0.5, 0.6], [0.1]),
        lambda: Basis([], []),
        lambda: Basis([[0.5]], [[0.1]]),
        lambda: Basis([0.2, 0.9], [0.1, 0.1], "rectangular"),
        lambda: Basis([0.5], [0.1], "cubic"),
        lambda: Basis([np.inf], [0.1]),
        lambda: Basis("a", [0.1]),
        lambda: Basis([1j], [0.1]),
        lambda: gaussian_basis(4, widths="a"),
        lambda: gaussian_basis(4, widths=[None]),
        lambda: gaussian_basis(4, widths=[[1.0], [1.0, 2.0]]),
        lambda: gaussian_basis("four"),
    ],
)
def test_hopeless_bases_are_refused(make):
    with pytest.raises(perdure.ArgumentError):
        make()


@pytest.mark.parametrize("n", [1, 2, 17, 64])
@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_operator_solves_the_normal_equations(n, penalty):
    basis, t = gaussian_basis(n), centred(50)
    made = ridge.fit_operator(basis, t, penalty)
    F = basis(t).T
    gram = F @ F.T
    lam = penalty * np.trace(gram) / n
    assert np.allclose(made.penalty, lam)
    wanted = linalg.solve(gram + lam * np.eye(n), F, assume_a="pos")
    assert np.allclose(made.matrix, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
    eigenvalues = np.maximum(linalg.eigvalsh(gram), 0)
    assert np.isclose(made.degrees_of_freedom, (eigenvalues / (eigenvalues + lam)).sum())


@pytest.mark.parametrize("widths", [(0.005, 0.01), 0.02, None])
@pytest.mark.parametrize("spans", [[(0, 1)], [(0.5, 0.5001)], [(0.4, 0.45), (0.9, 0.91)], [(0, 0.01), (0.99, 1)]])
def test_a_narrow_basis_is_solved_as_if_it_were_not(rng, widths, spans):
    """The band of F F^T, the windows of F and what is let go below rounding change nothing that can be seen."""
    basis, t = gaussian_basis(512, widths), np.concatenate([np.linspace(*span, 150) for span in spans])
    F = basis(t).T
    assert np.abs(ridge.transposed(basis, t) - F).max() < 1e-16 * F.max()
    made = ridge.fit_operator(basis, t, 1e-3)
    wanted = linalg.solve(F @ F.T + made.penalty * np.eye(512), F, assume_a="pos")
    assert np.abs(made.matrix - wanted).max() < 1e-9 * np.abs(wanted).max()
    scheme = Scheme(basis, 1e-3, 200)
    operator = scheme.later(0.5, 100)
    C = operator.matrix[:, : scheme.looks(0.5)] @ basis(scheme.old_positions(0.5))
    assert np.abs(scheme.recurrence(operator, 0.5) - C).max() < 1e-13 * np.abs(C).max()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_first_fit_may_be_to_a_single_sample(length):
    basis = gaussian_basis(512)
    F = basis(centred(length)).T
    made = ridge.fit_operator(basis, centred(length), 1e-3)
    wanted = linalg.solve(F @ F.T + made.penalty * np.eye(512), F, assume_a="pos")
    assert np.allclose(made.matrix, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


def test_qr_takes_over_and_agrees_with_least_squares():
    basis, t = gaussian_basis(24, 0.1), centred(200)
    made = ridge.fit_operator(basis, t, 1e-10)
    assert made.condition > ridge.WELL_CONDITIONED
    F, root = basis(t), np.sqrt(made.penalty)
    x = np.sin(9 * t)
    wanted = np.linalg.lstsq(np.vstack([F, root * np.eye(24)]), np.append(x, np.zeros(24)), rcond=None)[0]
    assert np.allclose(F @ (made.matrix @ x), F @ wanted, atol=1e-7)


def test_hopeless_fits_are_refused():
    with pytest.raises(perdure.ArgumentError, match="ridge"):
        ridge.fit_operator(gaussian_basis(24), centred(10), 0.0)
    with pytest.raises(perdure.ArgumentError, match="ridge"):
        ridge.fit_operator(gaussian_basis(64, 0.5), centred(200), 0.0)
    with pytest.raises(perdure.ArgumentError, match="out of reach"):
        ridge.fit_operator(Basis([0.25, 0.75], [1e-3, 1e-3]), centred(10), 1e-3)


@given(st.integers(0, 2**32))
def test_reach_is_that_of_the_nearest_function(seed):
    rng = np.random.default_rng(seed)
    basis = Basis(rng.random(5), rng.uniform(0.005, 0.05, 5))
    t = np.sort(rng.random(20))
    seen = (np.abs(t[:, None] - basis.centers) <= ridge.REACH * basis.widths).any(axis=1)
    if seen.all():
        ridge.fit_operator(basis, t, 1e-2)
    else:
        with pytest.raises(perdure.ArgumentError, match=f"{(~seen).sum()} of 20"):
            ridge.fit_operator(basis, t, 1e-2)


def test_threads_share_one_operator_and_a_forked_child_starts_anew():
    basis, t = gaussian_basis(40), centred(77)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: ridge.fit_operator(basis, t, 1e-2), range(32)))
    assert all(operator is made[0] for operator in made)
    cache = ridge.Cache(limit=100)
    cache.get("a", lambda: 1, lambda _: 40)
    with cache._lock:
        cache.start_anew()
        with ThreadPoolExecutor(1) as pool:  # another thread, which the old lock would keep out
            assert pool.submit(cache.get, "a", lambda: 2, lambda _: 40).result(timeout=10) == 2


def test_cache_is_shared_and_bounded():
    basis, t = gaussian_basis(16), centred(32)
    assert ridge.fit_operator(basis, t, 1e-3) is ridge.fit_operator(gaussian_basis(16), t.copy(), 1e-3)
    made = ridge.fit_operator(basis, t, 1e-3)
    like = np.zeros(1, np.float32)
    assert ridge.beside(made.key, made.matrix, like) is ridge.beside(made.key, made.matrix, like)
    small = ridge.Cache(limit=100)
    values = [small.get(i, lambda i=i: i, lambda _: 40) for i in range(10)]
    assert values == list(range(10))
    assert (len(small), small.nbytes) == (2, 80)
    assert small.get(9, lambda: "made again", lambda _: 40) == 9
    assert small.get("large", lambda: "large", lambda _: 101) == "large"
    assert (len(small), small.nbytes) == (2, 80)
    for length in range(1, 513):
        ridge.fit_operator(basis, centred(length), 1e-3)
    assert ridge.CACHE.nbytes <= ridge.CACHE_BYTES


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_point_on_an_edge_belongs_to_the_bin_on_its_right(dtype):
    for n in range(1, 200):
        seen = rectangular_basis(n)((np.arange(n + 1) / n).astype(dtype))
        assert np.array_equal(seen, np.eye(n)[[*range(n), n - 1]])
    assert np.array_equal(Basis([0.1, 0.5], [0.2, 0.6], "rectangular").edges, [0, 0.2, 0.8])
