"""Sticky memory: where attention fell, as a histogram, and what randomness it is sampled with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..backends.arrays import cast, inspectable, namespace
from ..backends.errors import ArgumentError, ShapeError
from ..backends.exchange import to_numpy
from ..core import checks
from ..core.density import attention_mass, checked_densities
from .rows import token_array
from .state import UNALTERED


def attention_of(attention: Any, count: int, density: str, bins: int | None = None) -> Any:
    """Attention checked: densities (mean, variance) as (count, Q) each, or a histogram (count, D) of float64.

    A histogram may have any D, unless `bins` says which.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError
    """
    if isinstance(attention, tuple):
        return _densities(attention, count, density)
    checks.floating_arrays(attention=attention)
    checks.shape("attention", attention, count, "D", whole=True)
    histogram = to_numpy(attention).astype(np.float64)
    if histogram.shape[1] == 0 or not np.isfinite(histogram).all() or (histogram < 0).any():
        raise ArgumentError("attention", "finite mass of at least 0 in 1 bin or more", "other", "Pass a histogram.")
    if bins is not None and histogram.shape[1] != bins:
        raise ShapeError("attention", f"({count}, {bins})", str(histogram.shape), "compat has a fixed D.")
    return histogram


def histogram_of(attention: Any, edges: np.ndarray, density: str) -> Any:
    """Mass by bin, (count, D) of float64, of what `attention_of` gave; on a GPU where its densities are there."""
    if not isinstance(attention, tuple):
        return attention
    mean, variance = attention
    mass = attention_mass(mean, variance, edges, density)
    mass = to_numpy(mass) if inspectable(mass) else mass
    return cast(mass, namespace(mass).float64)


def _densities(attention: tuple[Any, ...], count: int, density: str) -> tuple[Any, Any]:
    if len(attention) != 2:
        raise ArgumentError("attention", "(mean, variance) or a histogram", f"{len(attention)} arrays", "Pass two.")
    mean, variance = checked_densities(*attention, density, mean=attention[0])
    if mean.ndim < 2 or mean.shape[0] != count or tuple(variance.shape) not in (tuple(mean.shape), (1,)):
        came = f"{tuple(mean.shape)} and {tuple(variance.shape)}"
        raise ShapeError("attention", f"mean and variance ({count}, ..., q)", came, "Pass those of the last read.")
    xp = namespace(mean)
    flat = (count, math.prod(mean.shape[1:]))
    return xp.reshape(mean, flat), xp.reshape(xp.broadcast_to(variance, mean.shape), flat)


def drawn_bins(histogram: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Bins drawn with replacement, each with its share of the mass, (count, samples): the authors' way."""
    bins = histogram.shape[1]
    mass = histogram.sum(axis=1, keepdims=True)
    shares = np.where(mass > 0, histogram / np.where(mass > 0, mass, 1), 1 / bins)
    return np.stack([rng.choice(bins, samples, p=p / p.sum()) for p in shares])


def bins_drawn(argument: str, given: Any, shape: tuple[int, int], bins: int) -> np.ndarray:
    """`given` as integers of `shape`, each the index of a bin.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError
    """
    array = token_array(argument, given, shape, "integral")
    if array.size and (array.min() < 0 or array.max() >= bins):
        raise ArgumentError(argument, f"bins from 0 to {bins - 1}", f"{array.min()} to {array.max()}", "Pass indices.")
    return array


def generator(seed: int | np.random.Generator) -> np.random.Generator:
    """A generator whose state JSON can hold."""
    made = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(checks.count("seed", seed, least=0))
    if not isinstance(made.bit_generator, np.random.PCG64):
        raise ArgumentError("seed", "a PCG64 generator", type(made.bit_generator).__name__, "Use default_rng.")
    return made


def resumed(state: Any) -> np.random.Generator:
    """The generator whose state a state_dict holds.

    Raises
    ------
    ArgumentError
    """
    made = np.random.default_rng(0)
    try:
        made.bit_generator.state = state
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArgumentError("state['config']", "the state of a PCG64 generator", repr(error), UNALTERED) from error
    return made
