"""Every Hypothesis strategy of the tests.

`args_<kernel>` draws the positional arguments of that kernel as float64 NumPy arrays; the conformance test finds it by
its name.
"""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

KINDS = ("normal", "integers", "equal", "zeros", "large", "tiny", "outlier", "duplicates")
EXTREMES = (*KINDS, "near", "huge", "faint", "mixed")  # what a tolerance would drown, but exact bits do not


@st.composite
def values(draw, shape, kinds=KINDS):
    """A float64 array of `shape`; integers and equal values make ties, which a rounding error would break."""
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    array = rng.standard_normal(shape)
    match kind:
        case "integers":
            array = rng.integers(-2, 3, shape).astype(float)
        case "equal":
            array = np.full(shape, float(rng.integers(-2, 3)))
        case "zeros":
            array = np.zeros(shape)
        case "large":
            array *= 100
        case "tiny":
            array *= 1e-3
        case "outlier" if array.size:
            array[tuple(rng.integers(0, s) for s in shape)] = 50
        case "duplicates" if len(shape) > 1 and shape[-2] > 1:
            array = array[..., rng.integers(0, (shape[-2] + 1) // 2, shape[-2]), :]
        case "near":  # float32 neighbours of one vector
            array = (1 + rng.integers(-2, 3, shape) * 2.0**-23) * array[..., :1, :]
        case "huge":
            array *= 1e15
        case "faint":  # products below the smallest normal float32
            array *= 1e-20
        case "mixed":
            array *= 10.0 ** rng.integers(-8, 9, (*shape[:-1], 1))
    return array


@st.composite
def masks(draw, shape):
    """A bool array of `shape`: mostly True, mostly False, all, or nothing."""
    share = draw(st.sampled_from((0.0, 0.2, 0.8, 1.0)))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(shape) < share


LEADS = st.sampled_from(((), (1,), (2,), (2, 3)))
WIDTHS = st.sampled_from((0, 1, 2, 3, 4, 7, 8, 16, 17, 64, 65))
QUERIES = st.integers(0, 13)
SIZES = st.one_of(st.integers(0, 20), st.sampled_from((63, 64, 65, 130, 300)))


@st.composite
def args_retrieve(draw):
    lead, q, n, d = draw(LEADS), draw(QUERIES), draw(SIZES), draw(WIDTHS)
    shared = draw(st.booleans())  # one set of keys for all leading axes
    mask = draw(st.none() | masks((*lead, q, n)) | masks((q, n)))
    return (
        draw(values((*lead, q, d))),
        draw(values(((1,) * len(lead) if shared else lead) + (n, d))),
        draw(st.integers(1, n + 3)),
        draw(st.sampled_from(("ip", "cosine", "l2"))),
        mask,
        draw(st.integers(0, max(n - 1, 0))) if mask is None else 0,
    )


@st.composite
def args_retrieve_stored(draw):
    lead, q, n, d = draw(LEADS), draw(QUERIES), draw(SIZES), draw(WIDTHS)
    dtype, rng = draw(st.sampled_from(("bfloat16", "float16", "int8"))), np.random.default_rng(draw(st.integers(0, 99)))
    keys = draw(values((*lead, n, d))).astype(np.float32)
    stored = {
        "bfloat16": lambda: (keys.view(np.uint32) >> 16).astype(np.uint16).view(np.int16),
        "float16": lambda: keys.astype(np.float16).view(np.int16),
        "int8": lambda: rng.integers(-127, 128, keys.shape).astype(np.int8),
    }[dtype]()
    scales = rng.uniform(0, 2, keys.shape[:-1]).round(1) if dtype == "int8" else None
    space, start = draw(st.sampled_from(("ip", "cosine", "l2"))), draw(st.integers(0, max(n - 1, 0)))
    return draw(values((*lead, q, d))), stored, scales, dtype, draw(st.integers(1, n + 3)), space, start


@st.composite
def args_systematic(draw):
    lead, bins = draw(LEADS), draw(st.sampled_from((1, 2, 17, 128, 130)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mass = rng.uniform(0.1, 1, (*lead, bins)) * rng.integers(0, 2, (*lead, 1))  # or none at all: an empty bin is a step
    shift = draw(st.none() | st.just(rng.uniform(0.01, 0.99, (*lead, 1))))
    return mass, draw(st.sampled_from((1, 5, 200))), 0.5 if shift is None else shift


@st.composite
def args_unit(draw):
    return (draw(values((*draw(LEADS), draw(QUERIES), draw(WIDTHS)))),)


@st.composite
def args_attention(draw):
    lead, q, d, dv = draw(LEADS), draw(QUERIES), draw(WIDTHS), draw(WIDTHS)
    n, k = draw(SIZES.filter(bool)), draw(st.integers(1, 9))  # attend() itself answers where there is no key
    positions, width = None, n
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        positions, width = rng.integers(draw(st.sampled_from((-1, -n, 0))), n, (*lead, q, k)).clip(-1), k
    keys, rows = draw(values((*lead, n, d))), draw(values((*lead, n, dv)))
    mask = draw(st.none() | masks((*lead, q, width)))
    if mask is not None and positions is None and draw(st.booleans()):  # what no query may see may hold anything
        unseen = ~mask.any(axis=-2)
        keys[unseen], rows[unseen] = np.nan, draw(st.sampled_from((np.nan, np.inf)))
    return (
        draw(values((*lead, q, d))),
        keys,
        rows,
        positions,
        1 / math.sqrt(max(d, 1)),
        mask,
        0 if positions is None else draw(st.integers(0, n - 1)),
    )


@st.composite
def args_averaged(draw):
    lead, q, dv = draw(LEADS), draw(QUERIES), draw(WIDTHS)
    n, k = draw(SIZES.filter(bool)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions = rng.integers(draw(st.sampled_from((-1, -n, 0))), n, (*lead, q, k)).clip(-1)
    scores = np.where(positions < 0, -np.inf, draw(values((*lead, q, k))))  # as a search gives them
    return (
        scores,
        draw(values((*lead, n, dv))),
        positions,
        draw(st.sampled_from((1.0, 0.125))),
        draw(st.integers(0, n - 1)),
    )


@st.composite
def lses(draw, shape):
    array = draw(values(shape, kinds=("normal", "equal", "large")))
    return np.where(draw(masks(shape)), array, -np.inf)


@st.composite
def args_merged(draw):
    lead, q, dv = draw(LEADS), draw(QUERIES), draw(WIDTHS)
    sides = [(draw(values((*lead, q, dv))), draw(lses((*lead, q)))) for _ in range(2)]
    return (*sides[0], *sides[1])


@st.composite
def args_gated(draw):
    heads, q, dv = draw(st.integers(1, 3)), draw(QUERIES), draw(WIDTHS)
    shape = (*draw(st.sampled_from(((), (2,)))), heads, q, dv)
    lse = draw(st.none() | lses(shape[:-1]))
    return draw(values(shape)), draw(values(shape)), lse, draw(values((heads,)))


LAYOUTS = st.sampled_from(("contiguous", "fortran", "stepped", "reversed", "readonly"))


DENSITIES = ("truncated_gaussian", "gaussian", "sparsemax", "biweight")


@st.composite
def gaussian_bases(draw, most=12):
    """Centres in [0, 1] and widths of a Gaussian basis, in no order."""
    n = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.random(n), np.exp(rng.uniform(np.log(0.01), np.log(0.5), n))


@st.composite
def places(draw, most=9, least=0):
    """Positions in [0, 1], the ends among them."""
    n = draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    t = rng.random(n)
    for end in (0.0, 1.0):
        if n and draw(st.booleans()):
            t[rng.integers(n)] = end
    return t


@st.composite
def looks(draw, most=6):
    """Mean (..., q) and variance (..., q) of densities, from needles to nearly uniform."""
    shape = (*draw(st.sampled_from([(), (2,), (2, 1)])), draw(st.integers(1, most)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    variance = np.exp(rng.uniform(np.log(1e-6), np.log(4.0), shape))
    return rng.random(shape), variance


@st.composite
def args_gaussians(draw):
    return (draw(places()), *draw(gaussian_bases()))


@st.composite
def args_expected_basis(draw):
    return (*draw(looks()), *draw(gaussian_bases()), draw(st.sampled_from(DENSITIES)))


@st.composite
def args_expected(draw):
    mean, variance = draw(looks(most=40))
    centers, widths = draw(gaussian_bases(most=40))
    e = draw(st.sampled_from((1, 2, 17, 64, 65)))
    lead = draw(st.sampled_from(((), mean.shape[:-1])))
    return draw(values((*lead, centers.size, e))), mean, variance, centers, widths, draw(st.sampled_from(DENSITIES))


@st.composite
def args_interval_mass(draw):
    edges = np.linspace(0, 1, draw(st.integers(2, 9)))
    return (*draw(looks()), edges, draw(st.sampled_from(DENSITIES)))


args_histogram = args_interval_mass
