"""Where a query looks on a signal: mean and variance of its density, from its scores against the coefficients.

Shapes: queries q (rows, heads, n, d), coefficients B (rows, N, e), projections W_K (heads, d, e), so that the keys are
K = B W_K^T and the scores s = q K^T / sqrt(d), (rows, heads, n, N).
"""

from __future__ import annotations

import math
from typing import Any

from ..backends.arrays import namespace
from .attention import masked_softmax


def affine(q: Any, B: Any, W_K: Any, w_mean: Any, w_variance: Any, floor: float) -> tuple[Any, Any]:
    """mean = sigmoid(w_mean·s) and variance = max(softplus(w_variance·s), floor), each (rows, heads, n).

    w·s = q·(W_K B^T w)/sqrt(d): one vector a head in place of N keys, and no score is ever made.
    Source: ∞-former (arXiv 2109.00301), equations 9 and 10; w_mean and w_variance (N,) are shared by the heads.
    """
    xp = namespace(q)
    seen = xp.stack([w_mean, w_variance]) @ B  # B^T w: (rows, 2, e)
    keys = W_K @ xp.matrix_transpose(seen)[:, None, ...]  # (rows, heads, d, 2)
    scores = (q @ keys) / math.sqrt(q.shape[-1])  # (rows, heads, n, 2)
    mean = 0.5 + 0.5 * xp.tanh(0.5 * scores[..., 0])  # the sigmoid, whose gradient overflows nowhere
    return mean, at_least(softplus(scores[..., 1]), floor)


def moments(q: Any, B: Any, W_K: Any, centers: Any, widths: Any, floor: float) -> tuple[Any, Any]:
    """Mean and variance of the mixture softmax(s) of the basis functions themselves, each (rows, heads, n).

    Source: ∞-former, the authors' code without affine maps.
    """
    xp = namespace(q)
    keys = B[:, None, ...] @ xp.matrix_transpose(W_K)  # (rows, heads, N, d)
    scores = (q @ xp.matrix_transpose(keys)) / math.sqrt(q.shape[-1])
    weights, _ = masked_softmax(scores, xp.asarray(True, device=q.device))
    mean = weights @ centers
    return mean, at_least(weights @ (centers * centers + widths * widths) - mean * mean, floor)


def divergence(mean: Any, variance: Any, width: float, centre: float | None = None) -> Any:
    """KL of Normal(mean, variance) from Normal(centre, width²), the mean left free where `centre` is None.

    Source: ∞-former, equation 17; its weight in the authors' runs is 1e-6, the width .05.
    """
    xp = namespace(variance)
    ratio = variance / width**2
    free = 0.5 * (ratio - xp.log(ratio) - 1)
    return free if centre is None else free + 0.5 * (mean - centre) ** 2 / width**2


def softplus(x: Any) -> Any:
    """log(1 + e^x), without overflow."""
    xp = namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


def at_least(x: Any, floor: float) -> Any:
    """max(x, floor), with no gradient below."""
    xp = namespace(x)
    return xp.where(x > floor, x, xp.full_like(x, floor))
