"""Attention over what memory gave back, and how several readings become one.

A reading carries the log-sum-exp of its scores, so the softmax over a union of sets is a weighted mean of the readings
of each: no set need be seen twice (Milakov & Gimelshein 2018, arXiv 1805.02867; Rabe & Staats 2021, arXiv 2112.05682).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..backends import kernel
from ..backends.arrays import cast, common_framework, inspectable, namespace
from ..backends.errors import ArgumentError, DTypeError
from . import checks
from .retrieval import Neighbours, blanked, seen_by_any


@dataclass(frozen=True)
class Reading:
    """What a read returns.

    Attributes
    ----------
    output : array (..., q, dv)
        The weighted mean of the values; zeros where there was nothing to attend to.
    lse : array (..., q)
        Log-sum-exp of the scaled scores, in at least float32; -inf where there was nothing to attend to.
    neighbours : Neighbours or None
        What was attended to, when a memory retrieved it.
    """

    output: Any
    lse: Any
    neighbours: Neighbours | None = None


def attend(
    queries: Any, keys: Any, values: Any, positions: Any = None, scale: float | None = None, mask: Any = None
) -> Reading:
    """Softmax attention over all keys, or over each query's own neighbours.

    Parameters
    ----------
    queries : array (..., q, d)
    keys : array (..., n, d)
    values : array (..., n, dv)
    positions : integer array (..., q, k), optional
        Which keys each query attends to, as `top_k` returns them; -1 is nothing.
    scale : float, optional
        Factor on q·k; 1/sqrt(d) by default.
    mask : bool array, broadcastable to (..., q, n), or to (..., q, k) with positions; optional
        True where a query may attend. A key that no query may see may hold anything, NaN included.

    Returns
    -------
    Reading
        A query with nothing to attend to has output 0 and lse -inf, with zero (never NaN) gradients.

    Raises
    ------
    ShapeError, DTypeError, FrameworkError, ArgumentError
        Arrays that do not fit together, or positions outside the keys.
    NonFiniteError
        What a query saw is not finite, or its products overflow. Seen from the result, in main memory only: a GPU is
        not made to wait, and there NaN comes back.

    Notes
    -----
    Cost O(q k (d + dv)), or O(q n (d + dv)) without positions. Gradients reach queries, keys and values.
    Source: Memorizing Transformers (arXiv 2203.08913), section 3.1.
    """
    checks.floating_arrays(queries=queries, keys=keys, values=values)
    common_framework(queries=queries, positions=positions)
    checks.shape("queries", queries, "q", "d")
    checks.shape("keys", keys, "n", queries.shape[-1])
    checks.shape("values", values, keys.shape[-2], "dv")
    lead = checks.leading(queries=(queries, 2), keys=(keys, 2), values=(values, 2), positions=(positions, 2))
    xp = namespace(queries)
    if positions is not None:
        if not xp.isdtype(positions.dtype, "integral"):
            raise DTypeError("positions", "integers", str(positions.dtype), "Pass the positions top_k returned.")
        checks.shape("positions", positions, queries.shape[-2], "k")
        positions = cast(positions, xp.int64)  # PyTorch computes little with unsigned ones
        checks.within("positions", positions, -1, keys.shape[-2] - 1)
    width = keys.shape[-2] if positions is None else positions.shape[-1]
    checks.mask(mask, lead, queries.shape[-2], width)
    common_framework(queries=queries, mask=mask)
    scale = 1 / math.sqrt(max(queries.shape[-1], 1)) if scale is None else checks.number("scale", scale)
    if keys.shape[-2] == 0 or width == 0:  # nothing to attend to: one forbidden key keeps graph and formula whole
        keys, values = (
            xp.zeros((*a.shape[:-2], 1, a.shape[-1]), dtype=a.dtype, device=a.device) for a in (keys, values)
        )
        positions, mask = None, xp.zeros((1, 1), dtype=xp.bool, device=queries.device)
    checks.outcome(queries, queries=queries)
    output, lse = attention(queries, keys, values, positions, scale, mask, 0)
    checks.outcome(output, queries=queries, keys=keys, values=values)
    checks.outcome(xp.where(lse == -math.inf, xp.zeros_like(lse), lse), queries=queries, keys=keys)
    shape = (*lead, *output.shape[-2:])
    if tuple(output.shape) != shape or tuple(lse.shape) != shape[:-1]:
        output, lse = xp.broadcast_to(output, shape), xp.broadcast_to(lse, shape[:-1])
    return Reading(output, lse)


@kernel(wide=(1,))
def attention(
    queries: Any, keys: Any, values: Any, positions: Any, scale: float, mask: Any, start: int
) -> tuple[Any, Any]:
    """output = softmax(scale q·k) v and lse = log sum exp(scale q·k), over keys whose oldest stands at slot `start`."""
    xp = namespace(queries)
    if positions is None:
        allowed = xp.asarray(True, device=queries.device)
        if mask is not None:  # what no query may see is blank: 0 times NaN would be NaN
            allowed = mask
            seen = seen_by_any(mask, queries.shape[-2], keys.shape[-2])
            keys, values = blanked(keys, seen), blanked(values, seen)
        scores = scale * (queries @ xp.matrix_transpose(keys))  # (..., q, n)
    else:
        found = positions >= 0
        allowed = found if mask is None else found & mask
        slots = slots_of(positions, start, keys.shape[-2])
        keys, values = (blanked(gather(a, slots), allowed[..., None]) for a in (keys, values))  # (..., q, k, d or dv)
        scores = scale * xp.sum(queries[..., None, :] * keys, axis=-1)  # (..., q, k)
    weights, lse = masked_softmax(scores, allowed)
    if positions is None:
        return weights @ values, lse
    return xp.sum(weights[..., None] * values, axis=-2), lse


@kernel(wide=(1,))
def averaged(scores: Any, values: Any, positions: Any, scale: float, start: int) -> tuple[Any, Any]:
    """`attention` over neighbours whose inner products, (..., q, k), a search has computed already."""
    xp = namespace(scores)
    found = positions >= 0
    values = blanked(gather(values, slots_of(positions, start, values.shape[-2])), found[..., None])
    weights, lse = masked_softmax(scale * scores, found)
    return xp.sum(weights[..., None] * values, axis=-2), lse


def slots_of(positions: Any, start: int, n: int) -> Any:
    """Where the keys at `positions` stand in a ring of n whose oldest is at slot `start`; 0 for position -1."""
    return namespace(positions).where(positions >= 0, (positions + start) % n, 0)


def gather(table: Any, slots: Any) -> Any:
    """Rows of `table` (..., n, d) at `slots` (..., q, k) -> (..., q, k, d)."""
    xp = namespace(table)
    lead = checks.leading(table=(table, 2), slots=(slots, 2))
    flat = xp.reshape(xp.broadcast_to(slots, (*lead, *slots.shape[-2:])), (*lead, -1, 1))
    table = xp.broadcast_to(table, (*lead, *table.shape[-2:]))
    rows = xp.take_along_axis(table, cast(flat, xp.int64), axis=-2)
    return xp.reshape(rows, (*lead, *slots.shape[-2:], table.shape[-1]))


def masked_softmax(scores: Any, allowed: Any) -> tuple[Any, Any]:
    """Softmax over the last axis where `allowed`, with its log-sum-exp; zeros and -inf where nothing is allowed.

    Mask, finite maximum, exp, zero, divide by at least the smallest sum that can occur: in this order no NaN is ever
    made, so none has to be repaired, in the gradients either.
    """
    xp = namespace(scores)
    if scores.shape[-1] == 0:
        return scores, xp.sum(scores, axis=-1) - math.inf
    nothing = xp.asarray(0, dtype=scores.dtype, device=scores.device)
    allowed = xp.broadcast_to(allowed, scores.shape)
    scores = xp.where(allowed, scores, nothing)
    forbidden = xp.asarray(-math.inf, dtype=scores.dtype, device=scores.device)
    top = xp.max(xp.where(allowed, scores, forbidden), axis=-1, keepdims=True)
    top = xp.where(top == -math.inf, nothing, top)
    powers = xp.where(allowed, xp.exp(xp.where(allowed, scores - top, nothing)), nothing)
    total = xp.sum(powers, axis=-1, keepdims=True)
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)
    lse = xp.where(empty, forbidden, top + xp.log(total))
    return powers / total, lse[..., 0]


def merge(*readings: Reading) -> Reading:
    """The reading over the union of what each of `readings` read: exact softmax, whatever was split how.

    Parameters
    ----------
    readings : Reading
        Outputs (..., q, dv) and lse (..., q) of disjoint sets of keys, scored alike.

    Returns
    -------
    Reading
        Zeros and -inf where every reading was empty. `neighbours` are those of the first that has any. Where an lse is
        -inf the output may be anything, NaN included, as some attention leaves it.

    Raises
    ------
    ArgumentError, ShapeError, FrameworkError
        No reading at all, or readings that do not fit together.
    NonFiniteError
        An lse of NaN or infinity, or an output that is not finite where something was read; in main memory only.

    Notes
    -----
    Cost O(q dv) a reading; gradients reach outputs and lse.
    """
    if not readings:
        raise ArgumentError("readings", "at least one Reading", "none", "Pass the readings to merge.")
    for i, reading in enumerate(readings):
        if not isinstance(reading, Reading):
            raise ArgumentError(f"readings[{i}]", "a Reading", type(reading).__name__, "Pass what read or attend gave.")
    names = [(i, name) for i in range(len(readings)) for name in ("output", "lse")]
    parts = {f"readings[{i}].{name}": getattr(readings[i], name) for i, name in names}
    checks.floating_arrays(**parts)
    shape = readings[0].output.shape
    for (_, name), (argument, part) in zip(names, parts.items(), strict=True):
        checks.shape(argument, part, *(shape if name == "output" else shape[:-1]), whole=True)
    neighbours = next((r.neighbours for r in readings if r.neighbours is not None), None)
    if len(readings) == 1:
        return readings[0]
    output, lse = merged(*parts.values())
    if inspectable(output) and not checks.all_finite(output):
        lses = {f"readings[{i}].lse": blanked(r.lse, r.lse != -math.inf) for i, r in enumerate(readings)}
        checks.outcome(output, **lses, **{name: part for name, part in parts.items() if name not in lses})
    return Reading(output, lse, neighbours)


@kernel(wide=(1,))
def merged(*parts: Any) -> tuple[Any, Any]:
    """output = Σ e^lse_i output_i / Σ e^lse_i, given output_1, lse_1, output_2, lse_2, ..."""
    xp = namespace(parts[0])
    lses = xp.stack(parts[1::2], axis=-1)  # (..., q, readings)
    read = lses != -math.inf
    weights, lse = masked_softmax(lses, read)
    outputs = [weights[..., i, None] * blanked(part, read[..., i, None]) for i, part in enumerate(parts[::2])]
    return sum(outputs[1:], outputs[0]), lse


def gate(memory_output: Any, local_output: Any, bias: Any) -> Any:
    """Mix memory and local attention by a learned gate a head: g memory + (1 - g) local, g = sigmoid(bias).

    Parameters
    ----------
    memory_output : Reading or array (..., heads, q, dv)
        Given a Reading, a query that found nothing keeps its local output unchanged. Given an array, the rule is that
        of the authors' code: nothing found is a memory of zeros, (1 - g) local.
    local_output : array (..., heads, q, dv)
    bias : array (heads,)
        0 starts at an even mix.

    Returns
    -------
    array (..., heads, q, dv)

    Raises
    ------
    ShapeError, DTypeError, FrameworkError

    Notes
    -----
    Source: Memorizing Transformers, section 3.1, equation "V_a = V_m ⊙ g + V_c ⊙ (1 - g)".
    """
    reading = memory_output if isinstance(memory_output, Reading) else None
    output = memory_output if reading is None else reading.output
    lse = None if reading is None else reading.lse
    checks.floating_arrays(local_output=local_output, memory_output=output, lse=lse, bias=bias)
    checks.shape("local_output", local_output, "heads", "q", "dv")
    checks.shape("memory_output", output, *local_output.shape, whole=True)
    checks.shape("bias", bias, local_output.shape[-3], whole=True)
    if lse is not None:
        checks.shape("memory_output.lse", lse, *output.shape[:-1], whole=True)
    return gated(local_output, output, lse, bias)


@kernel
def gated(local: Any, memory: Any, lse: Any, bias: Any) -> Any:
    """g memory + (1 - g) local with g = 1 / (1 + e^-bias), and g = 0 where lse = -inf."""
    xp = namespace(local)
    share = ((1 + xp.tanh(bias / 2)) / 2)[:, None, None]  # (heads, 1, 1); the sigmoid without an overflow
    if lse is not None:
        read = lse > -math.inf
        share, memory = xp.where(read[..., None], share, xp.zeros_like(share)), blanked(memory, read[..., None])
    return share * memory + (1 - share) * local
