"""Densities on [0, 1]: where a query looks, and what it sees there of every function, E[psi(t)], in closed form.

| density | p(t) | source |
|---|---|---|
| gaussian | normal, its tails left outside [0, 1] | ∞-former, equation 11 |
| truncated_gaussian | normal, cut to [0, 1] and scaled to mass 1 | perdure's default |
| sparsemax | (a² - (t-m)²)+ / (2 s²), a³ = 3 s²/2: truncated parabola | Martins et al. 2020 (arXiv 2006.07214) |
| biweight | ((a² - (t-m)²)+ / (4 s²))², a⁵ = 15 s⁴: entmax with alpha 1.5 | the same |

m is `mean` and s² is `variance`, which for the last two is a parameter, not the variance of p. s² is held within
[1e-12, 1e12]: narrower than any basis sees, wider than [0, 1] can tell.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..backends import kernel
from ..backends.arrays import cast, computing_dtype, framework, inspectable, namespace
from ..backends.errors import ArgumentError
from ..backends.exchange import like as like_of
from ..backends.special import NARROWEST, WIDEST, erf
from . import checks
from .basis import edges_in, positions_in
from .signal import weighted

DENSITIES = ("truncated_gaussian", "gaussian", "sparsemax", "biweight")
# p(m + a u) a = sum_k polynomial[k] u^k on [-1, 1]
POLYNOMIALS = {"sparsemax": (3 / 4, 0, -3 / 4), "biweight": (15 / 16, 0, -15 / 8, 0, 15 / 16)}
# exact to rounding while the support is narrower than a function
NODES, WEIGHTS = (a.tolist() for a in np.polynomial.legendre.leggauss(20))
NARROW = 2.0  # half-width over sigma_j up to which they are used; beyond it the closed form cancels nothing


def mass(mean: Any, variance: Any, edges: Any, density: str = "truncated_gaussian") -> Any:
    """Mass of each density between neighbouring edges: the histogram that sticky memory samples from.

    Parameters
    ----------
    mean : array (..., q)
    variance : array (..., q), or a number for all
    edges : array (D + 1,), or plain numbers
        Ascending, in [0, 1].
    density : {"truncated_gaussian", "gaussian", "sparsemax", "biweight"}

    Returns
    -------
    array (..., q, D)

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError
    """
    mean, variance = checked_densities(mean, variance, density, mean=mean)
    return interval_mass(mean, variance, cast(edges_in(edges, mean=mean), mean.dtype), density)


def attention_mass(mean: Any, variance: Any, edges: np.ndarray, density: str) -> Any:
    """Histogram of where queries looked, summed over all of them: what a sticky memory samples from.

    mean, variance (..., q), checked; edges float64 (D + 1,) -> (..., D) beside them, of any scale.
    """
    return histogram(mean, variance, like_of(edges, mean), density)


def checked_densities(mean: Any, variance: Any, density: str, /, **beside: Any) -> tuple[Any, Any]:
    """`mean` and `variance` checked beside the one array named in `beside`, and widened to what they are computed in.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError
    """
    checks.choice("density", density, DENSITIES)
    mean = positions_in("mean", mean, **beside)
    checks.shape("mean", mean, "q")
    xp = namespace(mean)
    mean = cast(mean, computing_dtype(mean))
    if framework(variance) is None:
        variance = like_of(np.atleast_1d(checks.plain("variance", variance)), mean)
    checks.floating_arrays(mean=mean, variance=variance)
    checks.leading(mean=(mean, 0), variance=(variance, 0))
    if inspectable(variance) and not bool(xp.all((variance > 0) & xp.isfinite(variance))):
        raise ArgumentError("variance", "finite numbers above 0", "others", "Clamp it, to at least 1e-6 for example.")
    return mean, cast(variance, mean.dtype)


@kernel
def expected(B: Any, mean: Any, variance: Any, centers: Any, widths: Any, density: str) -> Any:
    """E[psi(t)]^T B: (..., N, e), (..., q), (..., q), (N,), (N,) -> (..., q, e)."""
    return weighted(expected_basis(mean, variance, centers, widths, density), B, B.dtype)


@kernel
def expected_basis(mean: Any, variance: Any, centers: Any, widths: Any, density: str) -> Any:
    """E[psi_j(t)] for Gaussian psi_j: (..., q), (..., q), (N,), (N,) -> (..., q, N)."""
    xp = namespace(mean)
    mean, variance = mean[..., None], xp.clip(variance, NARROWEST, WIDEST)[..., None]
    if density in POLYNOMIALS:
        return _expected_compact(mean, variance, centers, widths, density)
    total = variance + widths * widths  # (..., q, N)
    seen = xp.exp(-0.5 * (mean - centers) ** 2 / total) / xp.sqrt(2 * math.pi * total)  # N(m; mu, s² + sigma²)
    if density == "gaussian":
        return seen
    share = variance / total
    product_mean = centers * share + mean * (widths * widths / total)
    product_deviation = widths * xp.sqrt(share)
    return seen * _inside(product_mean, product_deviation) / _inside(mean, xp.sqrt(variance))


def inside_mass(mean: Any, variance: Any) -> Any:
    """Mass of each normal density inside [0, 1]: (..., q), (..., q) -> (..., q)."""
    xp = namespace(mean)
    return _inside(mean, xp.sqrt(xp.clip(variance, NARROWEST, WIDEST)))


def _inside(mean: Any, deviation: Any) -> Any:
    """The same by deviation; nothing cancels while the mean lies inside."""
    scale = 1 / (deviation * math.sqrt(2))
    return 0.5 * (erf((1 - mean) * scale) + erf(mean * scale))


def half_width(variance: Any, density: str) -> Any:
    """a, where the truncated parabola or the biweight density with this s² ends."""
    if density == "sparsemax":
        return (1.5 * variance) ** (1 / 3)
    return (15 * variance * variance) ** (1 / 5)


def _expected_compact(mean: Any, variance: Any, centers: Any, widths: Any, density: str) -> Any:
    """The same for densities that are a polynomial on m ± a. In float64: its moments cancel."""
    xp = namespace(mean)
    dtype = mean.dtype
    mean, variance, centers, widths = (cast(v, xp.float64) for v in (mean, variance, centers, widths))
    a = half_width(variance, density)  # (..., q, 1)
    polynomial = POLYNOMIALS[density]
    narrow = a < NARROW * widths  # (..., q, N)
    # In u = (t - m)/a psi is a normal density about `middle` with deviation `r`; its moments over [-1, 1] by recursion.
    middle = (centers - mean) / a
    r = xp.where(narrow, xp.ones_like(middle), widths / a)
    right, left = (1 - middle) / r, (-1 - middle) / r
    at_right, at_left = (xp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * r for z in (right, left))
    before, moment = 0.0, 0.5 * (erf(right / math.sqrt(2)) - erf(left / math.sqrt(2)))
    wide_seen = polynomial[0] * moment
    sign = 1.0
    for k, factor in enumerate(polynomial[1:], start=1):
        moment, before = middle * moment + (k - 1) * r * r * before - (at_right - sign * at_left), moment
        wide_seen = wide_seen + factor * moment
        sign = -sign
    # Narrower than psi, the density is summed over Gauss points, where psi is nearly a polynomial itself.
    near = xp.where(narrow, a / widths, xp.zeros_like(middle))
    offset = (mean - centers) / widths
    narrow_seen = 0.0
    for u, w in zip(NODES, WEIGHTS, strict=True):
        height = w * sum(c * u**k for k, c in enumerate(polynomial))
        z = offset + near * u
        narrow_seen = narrow_seen + height * xp.exp(-0.5 * z * z)
    narrow_seen = narrow_seen / (math.sqrt(2 * math.pi) * widths)
    return cast(xp.where(narrow, narrow_seen, wide_seen / a), dtype)


@kernel
def interval_mass(mean: Any, variance: Any, edges: Any, density: str) -> Any:
    """Mass between neighbouring edges: (..., q), (..., q), (D + 1,) -> (..., q, D)."""
    xp = namespace(mean)
    mean, variance = mean[..., None], xp.clip(variance, NARROWEST, WIDEST)[..., None]
    if density in POLYNOMIALS:
        u = xp.clip((edges - mean) / half_width(variance, density), -1.0, 1.0)
        powers = (factor * u ** (k + 1) / (k + 1) for k, factor in enumerate(POLYNOMIALS[density]) if factor)
        below = sum(powers, start=xp.zeros_like(u))
    else:
        below = 0.5 * erf((edges - mean) / xp.sqrt(2 * variance))
        if density == "truncated_gaussian":
            below = below / _inside(mean, xp.sqrt(variance))
    return below[..., 1:] - below[..., :-1]


@kernel
def histogram(mean: Any, variance: Any, edges: Any, density: str) -> Any:
    """Mass between neighbouring edges, summed over queries: (..., q), (..., q), (D + 1,) -> (..., D)."""
    return namespace(mean).sum(interval_mass.formula(mean, variance, edges, density), axis=-2)
