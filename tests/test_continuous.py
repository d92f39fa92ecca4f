"""ContinuousMemory: rows, ragged writes, stickiness, saving, and numbers that stay right for ten thousand writes."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure.core import original
from perdure.core.consolidation import Scheme, fitted, updated, updated_in_bins
from perdure.core.positions import after_contraction, centred
from perdure.core.ridge import fit_operator
from perdure.memory.protocol import Memory
from perdure.memory.state import pack, unpack

import perdure


def memory(rows=2, dim=3, basis=24, **settings):
    return perdure.ContinuousMemory(rows, dim, basis, samples=32, **settings)


def coefficients(mem):
    return np.asarray(mem.signal.coefficients)


def test_a_first_write_is_a_fit_and_later_ones_are_updates(rng):
    x = rng.standard_normal((2, 20, 3))
    mem = memory(dtype="float64")
    mem.write(x)
    signal = perdure.fit(x, mem.basis)
    assert np.array_equal(coefficients(mem), signal.coefficients)
    mem.write(x[:, :7])
    assert np.array_equal(coefficients(mem), signal.update(x[:, :7], samples=32).coefficients)
    assert mem.tokens.tolist() == [27, 27]
    assert isinstance(mem, Memory)
    assert mem.nbytes == coefficients(mem).nbytes


@given(st.integers(0, 2**32))
@settings(max_examples=25)
def test_rows_never_see_one_another(seed):
    """Ragged writes, clears and row subsets at once: each row is what it would be alone."""
    rng = np.random.default_rng(seed)
    together = memory(rows=3, dtype="float64")
    alone = [memory(rows=1, dtype="float64") for _ in range(3)]
    for _ in range(5):
        if rng.random() < 0.3:
            gone = [int(rng.integers(3))]
            together.clear(gone)
            alone[gone[0]].clear()
        rows = rng.permutation(3)[: rng.integers(1, 4)].tolist()
        x, mask = rng.standard_normal((len(rows), 9, 3)), rng.random((len(rows), 9)) < 0.6
        together.write(x, rows=rows, mask=mask)
        for i, row in enumerate(rows):
            alone[row].write(x[i : i + 1][:, mask[i]])
    mean = rng.random((3, 2, 4))
    reading = together.read(mean, 0.01)
    for i, mem in enumerate(alone):
        assert np.allclose(coefficients(together)[i], coefficients(mem)[0], atol=1e-12)
        assert together.tokens[i] == mem.tokens[0]
        assert (reading.lse[i] == (0 if mem.tokens[0] else -np.inf)).all()
        assert np.allclose(reading.output[i], mem.read(mean[i : i + 1], 0.01).output[0])


def test_a_row_of_zeros_stays_zero_whatever_its_neighbour_attends(rng):
    mem = memory()
    x = rng.standard_normal((2, 10, 3)) * np.array([0, 1])[:, None, None]
    for _ in range(5):
        mem.write(x, attention=(rng.random((2, 4)), np.full((2, 4), 0.01)))
    assert not coefficients(mem)[0].any()
    assert coefficients(mem)[1].any()


def test_reading_is_the_expected_value(rng):
    mem = memory(dtype="float64")
    mem.write(rng.standard_normal((2, 20, 3)))
    mean, variance = rng.random((2, 4, 5)), rng.random((2, 4, 5)) * 0.1 + 1e-3
    for density in ("truncated_gaussian", "gaussian", "sparsemax", "biweight"):
        reading = mem.read(mean, variance, density)
        for i in range(2):
            one = perdure.Signal(coefficients(mem)[i], mem.basis, 1e-3, np.float64, 20)
            assert np.allclose(reading.output[i], perdure.expected_value(one, mean[i], variance[i], density))
    only = mem.read(mean[:1], variance[:1], rows=[1])
    assert np.allclose(only.output[0], perdure.expected_value(one, mean[0], variance[0]))
    assert mem.read(mean[:, 0, 0:0], 0.1).output.shape == (2, 0, 3)


def test_sticky_keeps_what_was_attended_longer(rng):
    """A bump that reads look at survives writes that flatten it without stickiness."""
    t = (np.arange(256) + 0.5) / 256
    bump = np.exp(-0.5 * ((t - 0.3) / 0.02) ** 2)[None, :, None]
    left = {}
    for sticky in (True, False):
        mem = perdure.ContinuousMemory(1, 1, 64, samples=128, sticky=sticky, dtype="float64")
        mem.write(bump)
        where = 0.3
        for _ in range(4):
            mem.write(np.zeros((1, 256, 1)), attention=(np.full((1, 1), where), np.full((1, 1), 4e-3)))
            grid = np.linspace(0, 0.5, 500)
            seen = mem.signal(grid)[0, :, 0]
            where = float(grid[np.argmax(seen)])
        left[sticky] = float(np.trapezoid(seen, grid))
    assert left[True] > 5 * abs(left[False])


@pytest.mark.parametrize("compat", [None, "infinite-former"])
def test_a_saved_memory_goes_on_bit_for_bit(rng, compat):
    mem = memory(compat=compat, seed=5, ridge=0.1)
    looks = rng.random((2, 4)), rng.random((2, 4)) * 0.1 + 1e-3
    x = rng.standard_normal((2, 10, 3)).astype(np.float32)
    for _ in range(3):
        mem.write(x, attention=looks)
    state = mem.state_dict()
    restored = perdure.ContinuousMemory.from_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    other = perdure.ContinuousMemory.from_state_dict(state)
    for m in (mem, restored, other):
        m.clear([0])
        m.write(x, attention=looks)
        m.write(x[:, :4], attention=looks)
    assert np.array_equal(coefficients(mem), coefficients(restored))
    assert np.array_equal(coefficients(mem), coefficients(other))
    assert str(mem.report()) == str(restored.report())


def test_a_shared_generator_is_drawn_from_in_turn(rng):
    generator = np.random.default_rng(3)
    a, b = memory(seed=generator), memory(seed=generator)
    x, attention = rng.standard_normal((2, 10, 3)), rng.random((2, 4))
    for mem in (a, b):
        mem.write(x)
        mem.write(x, attention=attention)
    assert not np.array_equal(coefficients(a), coefficients(b))


def test_time_passes_by_the_token_where_a_segment_is_given(rng):
    x = np.cos(np.linspace(0, 3, 240))[None, :, None]
    at_once, in_parts = (perdure.ContinuousMemory(1, 1, 48, segment=80, dtype="float64") for _ in range(2))
    for mem in (at_once, in_parts):
        mem.write(x)
    at_once.write(x[:, :80])
    for part in np.split(x[:, :80], 4, axis=1):
        in_parts.write(part)
    t = np.linspace(
        0.05, 0.45, 30
    )  # the old signal: of the new one, parts written later take more room than earlier ones
    assert np.allclose(at_once.signal(t), in_parts.signal(t), atol=0.03)


def test_a_write_that_leaves_no_room_forgets(rng):
    """contraction^(n/segment) is 0 in float64."""
    mem = perdure.ContinuousMemory(1, 1, 16, segment=1)
    for value in (1.0, 2.0, 3.0):
        mem.write(np.full((1, 1200, 1), value), attention=rng.random((1, 4)))
        assert np.allclose(mem.signal([0.05, 0.5, 0.95]), value, rtol=0.05)
    assert np.allclose(mem.shown([0.5, 1]), [[3000, 3600]], rtol=1e-3)


def test_other_frameworks_and_gradients(rng):
    x, mean = rng.standard_normal((2, 10, 3)), rng.random((2, 4))
    wanted = memory(dtype="float64")
    mask = np.arange(10) < np.array([[10], [6]])
    for _ in range(3):
        wanted.write(x, attention=(mean, 0.01), mask=mask)
    for convert in (torch.from_numpy, array_api_strict.asarray):
        mem = memory(dtype="float64")
        for _ in range(3):
            mem.write(convert(x), attention=(convert(mean), 0.01), mask=convert(mask))
        assert type(mem.signal.coefficients) is type(convert(x))
        assert np.allclose(coefficients(mem), coefficients(wanted))
        assert type(mem.read(convert(mean), 0.1).output) is type(convert(x))
    leaf = torch.from_numpy(x).requires_grad_()
    mem.write(leaf)
    assert mem.signal.coefficients.requires_grad
    mem.write(leaf)  # the graph of the first write is let go
    (gradient,) = torch.autograd.grad(mem.signal([0.25]).sum(), leaf)
    alone = memory(dtype="float64")
    alone.write(np.zeros((2, 10, 3)))
    alone.write(np.ones((2, 10, 3)))
    assert np.allclose(gradient.sum(1)[0, 0], alone.signal([0.25])[0, 0, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precision_is_remembered_in_single(rng, dtype):
    x = torch.from_numpy(rng.standard_normal((2, 10, 3))).to(getattr(torch, dtype))
    mem = memory()
    mem.write(x)
    mem.write(x)
    assert mem.signal.coefficients.dtype == torch.float32
    assert mem.read(torch.full((2, 1), 0.5, dtype=x.dtype), 0.1).output.dtype == x.dtype


@pytest.mark.slow
def test_ten_thousand_consolidations_do_not_drift(rng):
    exact, rounded, tensors = memory(dtype="float64", rows=1), memory(rows=1), memory(rows=1)
    largest = 0.0
    for _ in range(10_000):
        x = rng.standard_normal((1, 8, 3))
        exact.write(x)
        rounded.write(x.astype(np.float32))
        tensors.write(torch.from_numpy(x.astype(np.float32)))
        largest = max(largest, float(np.abs(coefficients(exact)).max()))
    scale = np.abs(coefficients(exact)).max()
    assert largest < 10
    assert np.abs(coefficients(rounded) - coefficients(exact)).max() < 5e-5 * scale
    assert np.abs(coefficients(tensors) - coefficients(rounded)).max() < 1e-4 * scale


@pytest.mark.parametrize("is_original", [False, True])
def test_aggregation_over_bins_is_exact(rng, is_original):
    basis = perdure.gaussian_basis(24, [0.05, 0.1])
    scheme = Scheme(basis, 0.1, 40, is_original)
    B, x = rng.standard_normal((2, 24, 3)), rng.standard_normal((2, 9, 3))
    draws = rng.integers(0, original.BINS, (2, 40))
    whole = updated(scheme, B, x, 0.5, np.sort(draws, axis=1) / original.BINS)
    counts = original.counts_of_draws(draws)
    assert np.allclose(updated_in_bins(scheme, B, x, 0.5, original.left_edges(), counts), whole, atol=1e-12)


@pytest.mark.parametrize("widths", [None, [0.01, 0.02]])
@pytest.mark.parametrize("width", [4, 600])
def test_windows_leave_out_nothing_that_matters(rng, widths, width):
    basis = perdure.gaussian_basis(256, widths)
    B, x = rng.standard_normal((256, width)), rng.standard_normal((200, width))
    scheme = Scheme(basis, 1e-3, 300)
    where = np.sort(rng.random(300))
    operator = scheme.later(0.5, 200)
    for at, samples in ((None, basis(scheme.old_positions(0.5))), (where, basis(where))):
        wanted = operator.matrix @ np.concatenate([samples @ B, x])
        for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
            for convert in (np.asarray, torch.from_numpy):
                got = updated(scheme, convert(B.astype(dtype)), convert(x.astype(dtype)), 0.5, at)
                assert np.abs(np.asarray(got) - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["gaussian", "rectangular"])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_few_functions_and_wide_vectors_are_updated_by_a_matrix_of_the_positions(rng, kind, lead):
    basis = perdure.gaussian_basis(24) if kind == "gaussian" else perdure.rectangular_basis(24)
    B, x = rng.standard_normal((*lead, 24, 100)), rng.standard_normal((*lead, 50, 100))
    where = np.sort(rng.random((*lead, 200)), axis=-1)
    scheme = Scheme(basis, 1e-3, 200)
    wanted = scheme.later(0.5, 50).matrix @ np.concatenate([basis(where) @ B, x], axis=-2)
    for convert in (np.asarray, torch.from_numpy, array_api_strict.asarray):
        assert np.allclose(np.asarray(updated(scheme, convert(B), convert(x), 0.5, where)), wanted, atol=1e-11)


def test_threads_that_write_at_once_lose_nothing(rng):
    mem, x = memory(rows=1), rng.standard_normal((1, 3, 3))
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(mem.write, x) for _ in range(200)]:
            done.result()
    assert mem.tokens.tolist() == [600]


def test_compat_positions(rng):
    for length in (6, 7):
        t, zeros = original.first_positions(length)
        assert t.size == length
        assert ((t >= 0) & (t <= 1)).all()
        assert zeros.size == (length if length % 2 == 0 else length - 1)
        assert ((zeros < 0) | (zeros > 1)).all()
    old, new, zeros = original.update_positions(0.75, 4, 2)
    assert np.allclose(old, [0.1875, 0.375, 0.5625, 0.75])
    assert np.allclose(new, [0.875, 1])
    assert zeros.size == 6
    draws = memory(rows=1, compat="infinite-former")
    x = rng.standard_normal((1, 10, 3))
    draws.write(x)
    draws.write(x, draws=np.full((1, 32), 127))
    assert np.isfinite(coefficients(draws)).all()


def published(x, mu, sigma, lam, tau, M, B=None, bins=None):
    """Coefficients (N, e) of x (L, e) by the authors' formulas: a first fit, or an update of B with sticky `bins`."""

    def psi(t):
        return np.exp(-0.5 * ((t[:, None] - mu) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))

    L = len(x)
    if B is None:
        even = L % 2 == 0
        shift, first = (1 / (2 * L), L // 2) if even else (1 / L, (L - 1) // 2)
        t, kept = np.linspace(-0.5 + shift, 1.5 - shift, 2 * L if even else 2 * L - 1), np.arange(first, first + L)
    else:
        old, new = np.arange(1, M + 1, dtype=np.float32), np.arange(1, L + 1, dtype=np.float32)
        s = 1 / (2 * L + M)
        zeros = np.linspace(-0.5 + s, 1.5 - s, 2 * (L + M)).astype(np.float32)
        inside = np.concatenate([old * np.float32(tau) / np.float32(M), new * np.float32(1 - tau) / np.float32(L)])
        inside[M:] += np.float32(tau)
        t = np.concatenate([zeros[zeros < 0], inside, zeros[zeros > 1]]).astype(np.float64)
        kept = np.arange(M + L) + int((zeros < 0).sum())
        at = (old / np.float32(M)).astype(np.float64) if bins is None else np.sort(bins) / 128
        x = np.concatenate([psi(at) @ B, x])
    F = psi(t).T
    G = F.T @ np.linalg.inv(F @ F.T + lam * np.eye(len(mu)))
    return G[kept].T @ x


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize(("lengths", "tau", "M"), [((64, 64, 32, 16), 0.5, 32), ((15, 11, 7, 30), 0.6, 21)])
def test_compat_is_the_published_algorithm(rng, dtype, tolerance, lengths, tau, M):
    widths = [0.05, 0.1]
    mu, sigma = np.repeat(np.linspace(0, 1, 16), 2), np.tile(widths, 16)
    mem = perdure.ContinuousMemory(
        1, 3, perdure.gaussian_basis(32, widths), tau, 0.5, samples=M, dtype=dtype, compat="infinite-former"
    )
    wanted = None
    for write, length in enumerate(lengths):
        x, bins = rng.standard_normal((length, 3)), rng.integers(0, 128, M) if write > 1 else None
        mem.write(x[None], draws=None if bins is None else bins[None])
        wanted = published(x, mu, sigma, 0.5, tau, M, wanted, bins)
        assert np.abs(coefficients(mem)[0] - wanted).max() < tolerance * np.abs(wanted).max()


def test_for_horizon_keeps_its_word(rng):
    mem = perdure.ContinuousMemory.for_horizon(
        2048, 0.3, rows=1, dim=200, segment=256, features=4, dtype="float64", sticky=False
    )
    t = (np.arange(256) + 0.5) / 256
    first = np.cos(np.pi * t[:, None] * np.arange(4)) @ rng.standard_normal((4, 200))
    mem.write(rng.standard_normal((1, 256, 200)) * 0)
    mem.write(first[None])
    for _ in range(8):
        mem.write(np.zeros((1, 256, 200)))
    where = mem.contraction**8 * (mem.contraction + (1 - mem.contraction) * t)
    error = np.linalg.norm(mem.signal(where)[0] - first) / np.linalg.norm(first)
    assert error < 0.33
    assert mem.report(features=4).horizon >= 2048
    with pytest.raises(perdure.ArgumentError, match="at least"):
        perdure.ContinuousMemory.for_horizon(10**6, 0.01, rows=1, dim=1, most=64)
    with pytest.raises(perdure.ArgumentError, match=r"at least [01]"):  # of 32 functions, which are tried too
        perdure.ContinuousMemory.for_horizon(10**5, 0.01, rows=1, dim=1, most=32)
    for name, value in {"samples": 100, "basis": 64, "contraction": 0.5, "features": 1000}.items():
        with pytest.raises(perdure.ArgumentError, match=name):
            perdure.ContinuousMemory.for_horizon(2048, rows=1, dim=1, **{name: value})


X = np.ones((2, 4, 3))


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (perdure.ShapeError, lambda m: m.write(X[:1])),
        (perdure.ShapeError, lambda m: m.write(X[..., :2])),
        (perdure.ShapeError, lambda m: m.write(X[0])),
        (perdure.DTypeError, lambda m: m.write(X.astype(int))),
        (perdure.NonFiniteError, lambda m: m.write(X * np.inf)),
        (perdure.NonFiniteError, lambda m: m.write(np.where(np.arange(3) == 1, np.nan, X))),
        (perdure.ArgumentError, lambda m: m.write(X, rows=[0, 0])),
        (perdure.ArgumentError, lambda m: m.write(X, rows=[0, 2])),
        (perdure.ShapeError, lambda m: m.write(X, mask=np.ones((2, 3), bool))),
        (perdure.DTypeError, lambda m: m.write(X, mask=np.ones((2, 4)))),
        (perdure.ArgumentError, lambda m: m.write(X, attention=-np.ones((2, 4)))),
        (perdure.ArgumentError, lambda m: m.write(X, attention=np.full((2, 4), np.nan))),
        (perdure.ShapeError, lambda m: m.write(X, attention=np.ones((1, 4)))),
        (perdure.ArgumentError, lambda m: m.write(X, attention=np.ones((2, 0)))),
        (perdure.NonFiniteError, lambda m: m.write(X * 1e100)),  # finite as float64, not as it would be stored
        (perdure.NonFiniteError, lambda m: m.write(X * 1e30)),  # its squares would not be
        (perdure.FrameworkError, lambda m: m.write(None)),
        (perdure.FrameworkError, lambda m: m.write(X, attention=("a", 0.1))),
        (perdure.FrameworkError, lambda m: m.write(X, attention=(None, None))),
        (perdure.DTypeError, lambda m: m.write(X, attention=(np.full((2, 1), 0.5), "a"))),
        (perdure.DTypeError, lambda m: m.read(np.full((2, 1), 0.5), "a")),
        (perdure.ShapeError, lambda m: m.read(np.full((2, 1), 0.5), [0.1, 0.2])),
        (perdure.ShapeError, lambda m: m.shown(0.5)),
        (perdure.DTypeError, lambda m: m.shown("a")),
        (perdure.ArgumentError, lambda m: m.shown([2.0])),
        (perdure.ArgumentError, lambda m: m.write(X, attention=(np.full((2, 3), 2.0), np.ones((2, 3))))),
        (perdure.ArgumentError, lambda m: m.write(X, attention=(np.full((2, 3), 0.5),))),
        (perdure.ShapeError, lambda m: m.write(X, attention=(np.full((1, 3), 0.5), np.ones((1, 3))))),
        (perdure.ArgumentError, lambda m: m.write(X, draws=np.zeros((2, 32), int))),
        (perdure.ArgumentError, lambda m: m.read(np.full((2, 1), 1.5), 0.1)),
        (perdure.ShapeError, lambda m: m.read(np.full((3, 1), 0.5), 0.1)),
        (perdure.ArgumentError, lambda m: m.read(np.full((2, 1), 0.5), 0.0)),
        (perdure.ArgumentError, lambda m: m.clear([5])),
        (perdure.ArgumentError, lambda m: m.report(segment=0)),
        (perdure.ArgumentError, lambda m: m.from_state_dict({})),
        (perdure.ArgumentError, lambda m: m.from_state_dict({**m.state_dict(), "written": np.array([-1, 0])})),
        (perdure.ArgumentError, lambda m: m.from_state_dict({**m.state_dict(), "coefficients": np.ones(3)})),
    ],
)
def test_a_rejected_call_changes_nothing(rng, error, call):
    mem = memory()
    mem.write(rng.standard_normal((2, 5, 3)))
    before = mem.state_dict()
    with pytest.raises(error):
        call(mem)
    after = mem.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": 0},
        {"dim": 0},
        {"basis": 0},
        {"contraction": 1.0},
        {"contraction": 0},
        {"ridge": -1},
        {"samples": 0},
        {"segment": 0},
        {"segment": 10**17},  # contraction^(1/segment) is 1: no room for a token
        {"density": "cauchy"},
        {"bins": 0},
        {"dtype": "float16"},
        {"compat": "other"},
        {"seed": -1},
        {"seed": np.random.Generator(np.random.MT19937(0))},
    ],
)
def test_hopeless_settings_are_refused(settings):
    with pytest.raises(perdure.ArgumentError):
        perdure.ContinuousMemory(**{"rows": 1, "dim": 1, **settings})


def test_the_timeline_says_which_token_a_place_shows(rng):
    """Tokens that hold their own number: evaluated anywhere, the signal is the timeline, sticky or not."""
    for sticky in (True, False):
        mem = perdure.ContinuousMemory(1, 1, 128, sticky=sticky, dtype="float64", ridge=1e-4)
        for i in range(4):
            mem.write(np.arange(i * 64, (i + 1) * 64)[None, :, None] + 0.5, attention=rng.random((1, 6)) + 0.2)
        t = np.linspace(0.05, 0.95, 50)
        t = t[np.abs(t - 0.5) > 0.03]
        assert np.allclose(mem.shown(t)[0], mem.signal(t)[0, :, 0], atol=6)
        assert (np.diff(mem.shown(t)[0]) >= 0).all()
        assert np.allclose(mem.shown([0, 1]), [[0, 256]])
    mem.clear()
    assert not mem.shown([0, 0.5, 1]).any()


def test_no_rows_and_no_tokens_are_no_mistake(rng):
    mem = memory()
    mem.write(X)
    before = mem.state_dict()
    mem.write(X[:, :0])
    mem.write(X[:0], rows=[])
    assert mem.read(np.zeros((0, 1)), 0.1, rows=[]).output.shape == (0, 1, 3)
    assert mem.read(np.zeros((2, 0)), 0.1).output.shape == (2, 0, 3)
    assert mem.shown([0.5], rows=[]).shape == (0, 1)
    after = mem.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["generator", "rows", "ridge", "kind_of_basis", "last_segment", "none such"])
def test_an_altered_configuration_is_refused(name):
    mem = memory()
    mem.write(X)
    config, arrays = unpack("ContinuousMemory", mem.state_dict())
    with pytest.raises(perdure.ArgumentError):
        perdure.ContinuousMemory.from_state_dict(pack("ContinuousMemory", {**config, name: {"altered": [1]}}, arrays))


@pytest.mark.parametrize("compat", [None, "infinite-former"])
def test_a_refused_write_draws_nothing(rng, compat):
    settings = {"samples": 8, "compat": compat, "dtype": "float64"}
    mem = perdure.ContinuousMemory(2, 2, perdure.gaussian_basis(64, 0.0238), ridge=0, **settings)
    mem.write(rng.standard_normal((2, 128, 2)))
    before = mem.state_dict()
    with pytest.raises(perdure.ArgumentError):  # too few samples for 64 functions without a ridge
        mem.write(np.ones((2, 1, 2)), attention=np.ones((2, 128)))
    after = mem.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_attention_is_checked_where_it_is_not_used(rng):
    mem = memory(sticky=False)
    for attention in ("junk", -np.ones((2, 4)), np.ones((1, 4)), (np.full((2, 1), 2.0), 0.1)):
        with pytest.raises(perdure.ArgumentError):
            mem.write(X, attention=attention)
    plain = memory(sticky=False)
    for m, attention in ((mem, rng.random((2, 4))), (plain, None)):
        m.write(X)
        m.write(X, attention=attention)
    assert np.array_equal(coefficients(mem), coefficients(plain))


def test_a_copy_has_no_graph_and_leaves_the_memory_its_own():
    mem, x = memory(), torch.ones(2, 4, 3, requires_grad=True)
    mem.write(x)
    made = copy.deepcopy(mem)
    assert torch.equal(made.signal.coefficients, mem.signal.coefficients)
    assert not made.signal.coefficients.requires_grad
    assert mem.signal.coefficients.requires_grad
    made.write(x.detach())
    assert mem.tokens.tolist() == [4, 4]


@pytest.mark.parametrize("kind", ["scaled", "published", "rectangular"])
def test_no_stream_of_any_lengths_makes_the_signal_grow(rng, kind):
    bases = {
        "scaled": perdure.gaussian_basis(64),
        "published": perdure.gaussian_basis(64, [0.012, 0.02]),
        "rectangular": perdure.rectangular_basis(48),
    }
    for samples, segment, contraction in ((64, 512, 0.75), (4, 64, 0.4), (512, 8, 0.9), (512, None, 0.99)):
        memory = perdure.ContinuousMemory(1, 1, bases[kind], contraction, samples=samples, segment=segment, seed=1)
        for length in rng.choice([1, 2, 3, 8, 40], size=150):
            looked = None if rng.random() < 0.5 else rng.random((1, 128)) ** 4
            memory.write(np.sign(rng.standard_normal((1, int(length), 1))), looked)
            assert np.abs(memory.signal(np.linspace(0, 1, 257))).max() < 6
        C = memory.scheme.recurrence(memory.scheme.later(0.99, 1), 0.99)
        assert np.abs(np.linalg.eigvals(C)).max() < 1


@pytest.mark.parametrize("length", [1, 3, 16, 64, 600])
def test_few_tokens_fill_the_room_that_they_are_given(length):
    memory = perdure.ContinuousMemory(1, 1, 512)
    for _ in range(4):
        memory.write(np.ones((1, length, 1)))
        assert np.abs(memory.signal(np.linspace(0.02, 0.98, 99)) - 1).max() < 0.1
        assert abs(memory.read(np.array([[0.5]]), 0.05).output - 1).max() < 0.01


def test_a_write_of_enough_tokens_is_the_plain_fit(rng):
    basis, tau = perdure.gaussian_basis(64), 0.5
    scheme = Scheme(basis, 1e-3, 64)
    plain = fit_operator(basis, np.concatenate(after_contraction(tau, 64, 64)), 1e-3)
    assert scheme.looks(tau) == 64
    assert scheme.later(tau, 64) is plain
    assert scheme.first(64) is fit_operator(basis, centred(64), 1e-3)


def test_what_one_token_stands_for_is_what_so_many_copies_of_it_would_be(rng):
    scheme, x = Scheme(perdure.gaussian_basis(40), 1e-3, 40), rng.standard_normal((4, 2))
    copies = math.ceil(1 / 4 / scheme.basis.widths[0])
    assert np.abs(fitted(scheme, x) - fitted(scheme, np.repeat(x, copies, axis=0))).max() < 1e-12


def test_updates_that_share_positions_but_not_looks_are_kept_apart(rng):
    """A quarter of 512 even positions is old in one, half of them in the other: one operator, two recurrences."""
    basis, B = perdure.gaussian_basis(48), rng.standard_normal((1, 48, 2))
    for tau, looks, length in ((0.5, 256, 256), (0.25, 128, 384)):
        scheme, x = Scheme(basis, 1e-3, looks), rng.standard_normal((1, length, 2))
        samples = np.concatenate([basis(centred(looks)) @ B, x], axis=1)
        wanted = scheme.later(tau, length).matrix @ samples
        assert np.abs(updated(scheme, B, x, tau) - wanted).max() < 1e-11
