"""How the nearest keys of a row are found: each index follows the row's ring, and can be rebuilt from it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import numpy as np

from ..storage import RAW
from .auto import AutoIndex
from .bucketed import BucketedIndex
from .costs import Costs
from .exact import ExactIndex
from .hnsw import HNSWIndex
from .ivf import IVFIndex
from .protocol import Index


def make_index(
    name: str,
    heads: int,
    dim: int,
    space: str,
    dtype: str,
    capacity: int,
    target: float,
    seed: int,
    costs: Costs | None = None,
) -> Index:
    """An empty index of the kind `name`, for a row of that size.

    Raises
    ------
    MissingPackageError
        "hnsw" without hnswlib.
    """
    raw = np.dtype(RAW[dtype])
    makers: dict[str, Callable[[], Index]] = {
        "exact": functools.partial(ExactIndex, heads, dim, space, raw),
        "ivf": functools.partial(IVFIndex, heads, dim, space, raw, target, seed),
        "hnsw": functools.partial(HNSWIndex, heads, dim, space, capacity, target, seed),
    }
    if name == "bucketed":
        return BucketedIndex(space)
    if name != "auto":
        return makers[name]()
    if importlib.util.find_spec("hnswlib") is None or raw == np.float64:  # graphs are made in float32
        del makers["hnsw"]
    return AutoIndex(makers, target, costs)
