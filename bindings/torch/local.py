"""Attention within the window, through PyTorch's fused kernels."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def local_attention(
    queries: torch.Tensor,  # (rows, heads, q, d)
    keys: torch.Tensor,  # (rows, heads, n, d)
    values: torch.Tensor,  # (rows, heads, n, dv)
    allowed: torch.Tensor,  # (rows, q, n), at least one a query
    scale: float,
    bias: torch.Tensor | None = None,  # (rows or 1, heads, q, n), added to the scaled scores
) -> torch.Tensor:
    """softmax(scale q·k + bias) v over the allowed keys, (rows, heads, q, dv)."""
    mask = allowed[:, None]
    if bias is not None:
        mask = torch.where(mask, bias, -torch.inf).to(queries.dtype)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
