"""Attention with memory for models written in CuPy, or in any array-API framework: functions, in place of layers.

The memory may live anywhere; on the device of the arrays (`KNNMemory(device=...)`) nothing leaves it.
"""

from __future__ import annotations

from typing import Any

from ..backends.arrays import cast, computing_dtype, framework, namespace
from ..backends.exchange import like, to_numpy
from ..core import checks
from ..core.attention import attend, gate
from ..core.looking import affine
from ..memory.continuous import ContinuousMemory
from ..memory.knn import KNNMemory

__all__ = ["continuous_attention", "memorizing_attention"]


def memorizing_attention(
    queries: Any,
    keys: Any,
    values: Any,
    memory: KNNMemory,
    bias: Any,
    k: int = 32,
    scale: float | None = None,
    mask: Any = None,
) -> Any:
    """A segment's attention over itself, causally, and over what `memory` held before it; then it is remembered.

    Parameters
    ----------
    queries, keys : arrays (rows, heads, n, dim)
    values : array (rows, heads, n, value_dim)
    memory : KNNMemory
    bias : array (heads,)
        The gate between memory and segment is its sigmoid; a row that remembers nothing sees its segment alone.
    k : int
        How many of what is remembered a query sees.
    scale : float, optional
        Factor on q·k; 1/sqrt(dim) by default.
    mask : bool array (rows, n), optional
        False is padding: neither attended to nor remembered.

    Returns
    -------
    array (rows, heads, n, value_dim)

    Raises
    ------
    ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError
        The segment has not been remembered.

    Notes
    -----
    Cost of `KNNMemory.read` and `write`, and O(n² dim). No gradient.
    Source: Memorizing Transformers (arXiv 2203.08913), section 3.1, in that order: retrieve, then append.
    """
    xp, n = namespace(queries), queries.shape[-2]
    steps = xp.arange(n, device=queries.device)
    visible = steps[:, None] >= steps
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    local = attend(queries, keys, values, scale=scale, mask=visible)
    output = gate(memory.read(queries, k, scale), local.output, bias)
    memory.write(keys, values, mask=mask)
    return output


def continuous_attention(
    queries: Any,
    memory: ContinuousMemory,
    key_maps: Any,
    value_maps: Any,
    mean_map: Any,
    variance_map: Any,
    floor: float = 1e-4,
) -> tuple[Any, tuple[Any, Any]]:
    """What a segment's queries see of a continuous memory, to be added to its attention over itself.

    Parameters
    ----------
    queries : array (rows, heads, n, d)
    memory : ContinuousMemory
        With a basis of N functions of vectors of e components.
    key_maps : array (heads, d, e)
    value_maps : array (heads, dv, e)
    mean_map, variance_map : arrays (N,)
        Shared by the heads.
    floor : float
        Least variance.

    Returns
    -------
    output : array (rows, heads, n, dv)
    looked : (mean, variance), arrays (rows, heads, n)
        Where the queries looked: pass them as `attention` to the next `memory.write`.

    Raises
    ------
    ShapeError, DTypeError, FrameworkError, NonFiniteError, ArgumentError

    Notes
    -----
    O(rows heads n (N e + e dv)). Source: ∞-former (arXiv 2109.00301), section 3.1.
    """
    checks.floating_arrays(
        queries=queries, key_maps=key_maps, value_maps=value_maps, mean_map=mean_map, variance_map=variance_map
    )
    checks.shape("queries", queries, memory.rows, "heads", "n", "d", whole=True)
    heads, d = queries.shape[1], queries.shape[3]
    checks.shape("key_maps", key_maps, heads, d, memory.dim, whole=True)
    checks.shape("value_maps", value_maps, heads, "dv", memory.dim, whole=True)
    for name, array in (("mean_map", mean_map), ("variance_map", variance_map)):
        checks.shape(name, array, len(memory.basis), whole=True)
    xp = namespace(queries)
    dtype = computing_dtype(queries)
    q, W_K, w_mean, w_variance = (cast(a, dtype) for a in (queries, key_maps, mean_map, variance_map))
    B = memory.signal.coefficients
    if framework(B) != framework(q) or B.device != q.device:
        B = like(to_numpy(B), q)
    mean, variance = affine(q, cast(B, dtype), W_K, w_mean, w_variance, checks.positive("floor", floor))
    seen = memory.read(mean, variance).output  # (rows, heads, n, e)
    output = seen @ xp.matrix_transpose(cast(value_maps, dtype))
    return cast(output, queries.dtype), (mean, variance)
