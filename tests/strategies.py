"""Hypothesis strategies shared by all tests. args_<kernel> draws the positional arguments of a kernel, in float64."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

DENSITIES = ("truncated_gaussian", "gaussian", "sparsemax", "biweight")


@st.composite
def gaussian_bases(draw, most=12):
    """Centres in [0, 1] and widths of a Gaussian basis, in no order."""
    n = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.random(n), np.exp(rng.uniform(np.log(0.01), np.log(0.5), n))


@st.composite
def positions(draw, most=9, least=0):
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
    return (draw(positions()), *draw(gaussian_bases()))


@st.composite
def args_expected_basis(draw):
    return (*draw(looks()), *draw(gaussian_bases()), draw(st.sampled_from(DENSITIES)))


@st.composite
def args_interval_mass(draw):
    edges = np.linspace(0, 1, draw(st.integers(2, 9)))
    return (*draw(looks()), edges, draw(st.sampled_from(DENSITIES)))
