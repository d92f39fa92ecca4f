"""CUDA kernels run on the CPU, thread by thread: tiles, runs, ties and gradients; and that these checks can fail.

What runs is the source that GPUs get, behind `cuda_host/shim.h`. This checks its logic; it is no test on a GPU. The
same tests marked `gpu` are: `nox -s gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import cuda_host
import numpy as np
import perdure.core.attention
import perdure.core.density
import perdure.core.positions
import perdure.core.retrieval  # noqa: F401 - these define the kernels
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure.backends import KERNELS, cuda
from perdure.backends.cuda.neighbours import found
from perdure.core.stored import decode


@pytest.fixture(autouse=True)
def on_host():
    cuda_host.launched.clear()
    with cuda_host.registered():
        yield


class OnGPU:
    """The launchers, on copies of NumPy's arrays on a GPU."""

    def __getattr__(self, name):
        import cupy

        def call(*args):
            results = getattr(cuda, name)(*(cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in args))
            if results is NotImplemented:
                return results
            return tuple(map(cupy.asnumpy, results)) if isinstance(results, tuple) else cupy.asnumpy(results)

        return call


@pytest.fixture(scope="module", params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    return cuda if request.param == "host" else OnGPU()


def whole(rng, *shape):
    """Whole numbers: every product and sum is exact, and many are equal."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def ranked(scores, k):
    """Positions of the k best, ties to the newest, by sorting all."""
    return np.lexsort((-np.broadcast_to(np.arange(scores.shape[-1]), scores.shape), -scores), axis=-1)[..., :k]


# ---- exact top-k ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["ip", "l2"])
@settings(max_examples=25)
@given(data=st.data())
def test_ties_go_to_the_newest_whatever_the_tiles(kernels, space, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n = data.draw(st.sampled_from((1, 63, 64, 65, 255, 256, 257, 600, 1030)))
    q, d, k = (data.draw(st.sampled_from(s)) for s in ((1, 31, 129), (1, 31, 64, 65, 129), (1, 33, 63, 64)))
    batch, start = data.draw(st.sampled_from((1, 2))), data.draw(st.integers(0, n - 1))
    queries, keys = whole(rng, batch, q, d), whole(rng, data.draw(st.sampled_from((1, batch))), n, d)
    aged = np.roll(keys, -start, axis=1)
    distances = ((queries[:, :, None] - aged[:, None]) ** 2).sum(-1)
    truth = queries @ aged.swapaxes(1, 2) if space == "ip" else -distances
    scores, positions = kernels.retrieve(queries, keys, k, space, None, start)
    expected = ranked(truth, k)
    np.testing.assert_array_equal(positions[..., : expected.shape[-1]], expected)
    np.testing.assert_array_equal(scores[..., : expected.shape[-1]], np.take_along_axis(truth, expected, -1))
    assert (positions[..., expected.shape[-1] :] == -1).all()
    assert (scores[..., expected.shape[-1] :] == -np.inf).all()


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_candidates_never_overflow(kernels, rng, order):
    """Scanned newest first, falling ages make every key a candidate, rising ones only the first."""
    n = 700
    ramp = {"rising": np.arange(n), "falling": np.arange(n)[::-1], "equal": np.ones(n)}[order].astype(np.float32)
    scores, positions = kernels.retrieve(np.ones((40, 1), np.float32), ramp[:, None].copy(), 64, "ip", None, 0)
    expected = ranked(np.broadcast_to(ramp, (40, n)), 64)
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(scores, ramp[expected])


@pytest.mark.parametrize("n", [4, 80])  # the second on tensor cores
def test_zeros_of_both_signs_are_equal(kernels, n):
    keys = np.where(np.arange(n) % 2, 0.0, -0.0).astype(np.float32)[:, None]
    _, positions = kernels.retrieve(np.ones((1, 1), np.float32), keys, 4, "ip", None, 0)
    assert positions.tolist() == [[n - 1, n - 2, n - 3, n - 4]]


def chained(query, keys):
    """Scores as retrieve.cu defines them: summed in float32, component by component."""
    total = np.zeros(len(keys))
    for c in range(keys.shape[1]):  # a product of float32 is exact in float64, and the sum is rounded once more to 32
        total = (total + np.float64(query[c]) * keys[:, c]).astype(np.float32).astype(np.float64)
    return total


ALIKE = ("near", "one direction", "long one", "vast", "spread", "faint")


def alike(kind, rng, n, d):
    """Keys that bfloat16 tells apart hardly, or not at all; and norms that leave the range that bounds are made in."""
    keys = rng.standard_normal((n, d))
    match kind:
        case "near":
            keys = keys[:1] * (1 + 1e-5 * keys)
        case "one direction":
            keys = keys + 50
        case "long one":
            keys[rng.integers(n)] *= 1e6
        case "vast":
            keys *= 1e16
        case "spread":
            keys *= 10.0 ** rng.integers(-25, 16, (n, 1))
        case "faint":
            keys *= 1e-30
    return keys.astype(np.float32)


@pytest.mark.parametrize("d", [33, 100])
@pytest.mark.parametrize("kind", ALIKE)
def test_the_result_is_exact_where_rounding_tells_little_apart(kernels, kind, d):
    rng = np.random.default_rng(d)
    queries, keys = rng.standard_normal((3, d)).astype(np.float32), alike(kind, rng, 700, d)
    queries = queries * np.float32({"vast": 1e16, "spread": 1e-12}.get(kind, 1))
    truth = np.stack([chained(query, keys) for query in queries])
    scores, positions = kernels.retrieve(queries, keys, 40, "ip", None, 0)
    np.testing.assert_array_equal(positions, ranked(truth, 40))
    np.testing.assert_array_equal(scores, np.take_along_axis(truth, positions, -1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_keys_are_searched_as_they_are_stored(kernels, rng, dtype):
    queries, scales = rng.standard_normal((2, 5, 36)).astype(np.float32), None
    bits = rng.integers(0x3000, 0x3C00, (2, 700, 36)).astype(np.uint16)
    keys = (bits | rng.integers(0, 2, bits.shape).astype(np.uint16) << 15).view(np.int16)
    if dtype == "int8":
        keys, scales = keys.astype(np.int8), rng.random((2, 700)).astype(np.float32)
    scores, positions = kernels.retrieve_stored(queries, keys, scales, dtype, 32, "ip", 5)
    numbers = np.roll(decode(keys, scales, dtype), -5, axis=1)
    truth = np.stack([[chained(q, own) for q in some] for some, own in zip(queries, numbers, strict=True)])
    np.testing.assert_array_equal(positions, ranked(truth, 32))
    np.testing.assert_array_equal(scores, np.take_along_axis(truth, positions, -1))


def test_what_is_not_finite_is_a_candidate_like_any_other(kernels, rng):
    queries, keys = whole(rng, 2, 40), whole(rng, 300, 40)
    keys[[3, 70, 299]] = [[np.nan], [np.inf], [-np.inf]]
    queries[:, 0] = 1  # so that no infinity meets a zero alone
    with np.errstate(invalid="ignore"):
        truth = queries @ keys.T
    _, positions = kernels.retrieve(queries, keys, 20, "ip", None, 0)
    finite = np.where(np.isfinite(truth), truth, -np.inf)
    np.testing.assert_array_equal(positions, ranked(finite, 20))


def test_equal_keys_score_equally_wherever_they_stand(kernels, rng):
    vector = rng.standard_normal(65).astype(np.float32)
    keys, query = np.tile(vector, (517, 1)), rng.standard_normal((1, 65)).astype(np.float32)
    scores, positions = kernels.retrieve(query, keys, 60, "ip", None, 0)
    assert len(set(scores.ravel().tolist())) == 1
    assert positions.ravel().tolist() == list(range(516, 456, -1))


@pytest.mark.parametrize("shape", [(2, 5, 300), (1, 5, 300), (5, 300), (1, 300), (5, 1), (2, 1, 1)])
def test_masks_of_every_shape(kernels, rng, shape):
    queries, keys, mask = whole(rng, 2, 5, 8), whole(rng, 2, 300, 8), rng.random(shape) < 0.3
    _, positions = kernels.retrieve(queries, keys, 20, "ip", mask, 7)
    _, expected = KERNELS["retrieve"].formula(queries, keys, 20, "ip", mask, 7)
    np.testing.assert_array_equal(positions, expected)


@pytest.mark.parametrize(
    ("dtype", "k", "q", "n", "d"),
    [
        ("float64", 3, 2, 9, 4),
        ("float32", 65, 2, 9, 4),
        ("float32", 3, 0, 9, 4),
        ("float32", 3, 2, 0, 4),
        ("float32", 3, 2, 9, 0),
    ],
)
def test_what_the_kernel_does_not_take_is_left_to_the_formula(kernels, dtype, k, q, n, d):
    assert kernels.retrieve(np.ones((q, d), dtype), np.ones((n, d), dtype), k, "ip", None, 0) is NotImplemented
    assert cuda_host.launched == []


# ---- attention over neighbours, and its gradient --------------------------------------------------------------------


@settings(max_examples=25)
@given(data=st.data())
def test_gradients_are_those_of_the_formula(kernels, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    q, n, k, d, dv = (data.draw(st.sampled_from(s)) for s in ((1, 5), (1, 40), (1, 7, 33), (1, 33), (1, 40)))
    lead, dtype = data.draw(st.sampled_from(((), (2,)))), data.draw(st.sampled_from(("float32", "float64")))
    start = data.draw(st.integers(0, n - 1))
    arrays = [data.draw(strategies.values((*lead, *s))).astype(dtype) for s in ((q, d), (n, d), (n, dv))]
    positions = rng.integers(-2, n, (*lead, q, k)).clip(-1)  # the same key more than once, too
    mask = data.draw(st.none() | strategies.masks((*lead, q, k)))
    of_output, of_lse = rng.standard_normal((*lead, q, dv)), rng.standard_normal((*lead, q))

    leaves = [torch.from_numpy(a).double().requires_grad_() for a in arrays]
    seen = None if mask is None else torch.from_numpy(mask)
    output, lse = KERNELS["attention"].formula(*leaves, torch.from_numpy(positions), 0.3, seen, start)
    total = (output * torch.from_numpy(of_output)).sum() + (lse * torch.from_numpy(of_lse))[lse > -torch.inf].sum()
    expected = torch.autograd.grad(total, leaves) if total.requires_grad else [torch.zeros_like(a) for a in leaves]

    made, _ = kernels.attention(*arrays, positions, 0.3, mask, start)
    call = (*arrays, found(positions, mask), 0.3, start)
    gradients = kernels.attention_backward(*call, made, of_output.astype(dtype), of_lse.astype(dtype), True)
    for gradient, wanted in zip(gradients, expected, strict=True):
        wanted = wanted.numpy()
        tolerance = (2e-4 if dtype == "float32" else 1e-10) * np.abs(wanted).max(initial=1)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=tolerance)


def test_what_no_query_may_see_is_not_read(kernels):
    keys, values = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    keys[2], values[2] = np.nan, np.nan
    positions, mask = np.array([[0, 2, 3]]), np.array([[True, False, True]])
    output, lse = kernels.attention(np.ones((1, 3), np.float32), keys, values, positions, 1.0, mask, 0)
    assert np.isfinite(output).all()
    assert np.isfinite(lse).all()


# ---- expectations and histograms over more than one block -----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("density", ["gaussian", "truncated_gaussian"])
def test_expectations_over_several_tiles(kernels, rng, density, dtype):
    B, mean, variance = rng.standard_normal((2, 70, 130)), rng.random((2, 65)), rng.uniform(1e-4, 0.1, (2, 65))
    looks = mean, variance, rng.random(70), rng.uniform(0.01, 0.2, 70)
    result = kernels.expected(*(a.astype(dtype) for a in (B, *looks)), density)
    wanted = KERNELS["expected_basis"].formula(*looks, density) @ B
    np.testing.assert_allclose(
        result, wanted, rtol=0, atol=(2e-5 if dtype == "float32" else 1e-11) * np.abs(wanted).max()
    )


@pytest.mark.parametrize("density", strategies.DENSITIES)
def test_histograms_over_several_runs_and_more_bins_than_threads(kernels, rng, density):
    mean, variance, edges = rng.random((3, 200)), rng.uniform(1e-4, 0.1, (3, 200)), np.linspace(0, 1, 301)
    result = kernels.histogram(mean.astype("f"), variance.astype("f"), edges.astype("f"), density)
    wanted = KERNELS["histogram"].formula(mean, variance, edges, density)
    np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-4 * wanted.max())


@pytest.mark.parametrize("shape", [(3, 64), (2, 2, 1024)])
def test_resampling_skips_empty_bins(kernels, rng, shape):
    histogram = rng.integers(0, 2, shape) * 2.0 ** rng.integers(-3, 4, shape)  # of which all sums are exact
    kept = kernels.systematic(histogram.astype(np.float32), 64, 0.5)
    np.testing.assert_allclose(kept, KERNELS["systematic"].formula(histogram, 64, 0.5), rtol=0, atol=1e-6)
    bins = np.minimum((kept * shape[-1]).astype(int), shape[-1] - 1)
    assert (np.take_along_axis(histogram, bins, axis=-1) > 0).mean() > 0.99  # the end of a bin begins the next


# ---- the checks can fail --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def same_turns(monkeypatch):
    """Threads take turns in an order that does not depend on the tests before; what it hides, the next try shows."""
    monkeypatch.setattr(cuda_host, "seeds", np.random.default_rng(0))


def altered(file, old, new):
    text = cuda.source(file)
    assert old in text
    return cuda_host.compile_text("altered", text.replace(old, new, 1))


def exact(built, monkeypatch, rng, d=140):
    """Whether top-k, of more components than tensor cores are asked for, is right."""
    monkeypatch.setattr(cuda_host, "library", lambda file: built)
    queries, keys = whole(rng, 33, d), whole(rng, 300, d)
    _, positions = cuda.retrieve(queries, keys, 20, "ip", None, 0)
    return (positions == ranked(queries @ keys.T, 20)).all()


@pytest.mark.parametrize(
    "barrier",
    ["__syncthreads();  // the chunk before has been used", "            __syncthreads();\n            for (int c = 0"],
)
def test_a_missing_barrier_shows(monkeypatch, rng, barrier):
    assert exact(altered("retrieve.cu", barrier, barrier), monkeypatch, rng)
    without = altered("retrieve.cu", barrier, barrier.replace("__syncthreads();", ""))
    assert not all(exact(without, monkeypatch, rng) for _ in range(4))


CERTIFY = "certify_float32.cu"


def certified_exactly(built, monkeypatch, kind):
    """Whether top-k behind a first pass is right, where many candidates have to be told apart in full, or few."""
    monkeypatch.setattr(cuda_host, "library", lambda file: built)
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((5, 40)).astype(np.float32), alike(kind, rng, 1030, 40)
    truth = np.stack([chained(query, keys) for query in queries])
    return (cuda.retrieve(queries, keys, 60, "ip", None, 0)[1] == ranked(truth, 60)).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[w + 4 * i + pair]", "[w + 4 * (1 - i) + pair]"),  # components of keys in another order than of queries
        ("2 * pair + i;", "2 * i + pair % 2;"),  # sums taken for others'
        ("__syncthreads();  // the tile is there, and", "//"),
        ("__syncthreads();  // the tile has been used, and", "//"),
        ("keep(list, own, last, lane)", "keep(list, own, 0, lane) / 2"),
        ("least = max(least, (unsigned)(settle(list, kept, k, lane) >> 32));", ""),
        ("return wide < WIDEST ? wide : -NOTHING", "return 1e-3f * wide"),  # too narrow a band
    ],
)
def test_an_altered_first_pass_shows(monkeypatch, old, new):
    built = altered(CERTIFY, old, new)
    with suppress(RuntimeError):  # threads that wait forever show it, too
        assert not all(certified_exactly(built, monkeypatch, kind) for kind in ("near", "random") * 4)


def test_an_unaltered_one_does_not(monkeypatch):
    assert all(certified_exactly(altered(CERTIFY, "", ""), monkeypatch, kind) for kind in ("near", "random"))


def test_a_barrier_that_some_threads_skip_is_an_error(monkeypatch, rng):
    built = altered("retrieve.cu", "__syncthreads();  // the chunk", "if (t > 0) __syncthreads();  // the chunk")
    with pytest.raises(RuntimeError, match="wait for one another forever"):
        exact(built, monkeypatch, rng)


def test_an_argument_of_another_type_is_an_error():
    words = [np.uint64(0), np.uint64(0), np.int64(0), np.int64(1)]
    with pytest.raises(TypeError, match="unit_float32 takes p8p8i8i4, but was given p8p8i8i8"):
        cuda_host.start("unit.cu", "unit_float32", (1,), 128, words, None)


# ---- nothing is read or written outside the arrays ------------------------------------------------------------------

CXX = cuda_host.compiler() or "none"
LIBRARIES = (
    [
        Path(subprocess.run([CXX, f"-print-file-name=lib{n}.so"], capture_output=True, text=True).stdout.strip())
        for n in ("asan", "ubsan")
    ]
    if sys.platform == "linux"
    else []
)


def sanitized(*fault):
    """A sweep over all kernels, compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""
    variables = {
        "CUDA_HOST_FLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "ASAN_OPTIONS": "detect_leaks=0",
        "LD_PRELOAD": " ".join(map(str, LIBRARIES)),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-m", "cuda_host.sweep", *fault]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(Path.exists, LIBRARIES or [Path("none")])), reason="the compiler has no sanitizers")
def test_sanitizers_find_nothing_but_planted_faults():
    result = sanitized()
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == sorted(k for f in cuda.sources() for k in cuda_host.kernels_of(cuda.source(f)))
    for fault, told in (
        (("position >= first && depth + c < d ? keys", "depth + c < d ? keys"), "heap-buffer-overflow"),
        (("stored <= ROOM - KEYS", "stored <= ROOM"), "out of bounds"),
    ):
        assert told in sanitized(*fault).stderr
