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


def histogram_of(attention: Any, count: int, edges: np.ndarray, density: str, exact: bool) -> Any:
    """Attention as float64 (count, D), from densities (mean, variance), (count, ..., q) each, or from a histogram.

    A histogram may have any D, unless `exact` demands that of `edges`. What densities on a GPU add up to stays there,
    unless it is `exact`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError
    """
    if isinstance(attention, tuple):
        mass = _of_densities(attention, count, edges, density)
        if not inspectable(mass) and not exact:
            return cast(mass, namespace(mass).float64)
        mass = to_numpy(mass).astype(np.float64)
    else:
        checks.floating_arrays(attention=attention)
        checks.shape("attention", attention, count, "D", whole=True)
        mass = to_numpy(attention).astype(np.float64)
    if mass.shape[1] == 0 or not np.isfinite(mass).all() or (mass < 0).any():
        raise ArgumentError("attention", "finite mass of at least 0 in 1 bin or more", "other", "Pass a histogram.")
    if exact and mass.shape[1] != edges.size - 1:
        raise ShapeError("attention", f"({count}, {edges.size - 1})", str(mass.shape), "compat has a fixed D.")
    return mass


def _of_densities(attention: tuple[Any, ...], count: int, edges: np.ndarray, density: str) -> Any:
    if len(attention) != 2:
        raise ArgumentError("attention", "(mean, variance) or a histogram", f"{len(attention)} arrays", "Pass two.")
    mean, variance = checked_densities(*attention, density, mean=attention[0])
    if mean.ndim < 2 or mean.shape[0] != count or tuple(variance.shape) not in (tuple(mean.shape), (1,)):
        came = f"{tuple(mean.shape)} and {tuple(variance.shape)}"
        raise ShapeError("attention", f"mean and variance ({count}, ..., q)", came, "Pass those of the last read.")
    xp = namespace(mean)
    variance = xp.broadcast_to(variance, mean.shape)
    flat = (count, math.prod(mean.shape[1:]))
    return attention_mass(xp.reshape(mean, flat), xp.reshape(variance, flat), edges, density)


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
