"""At which distance a memory is seen: keys turned from the position they were computed at to another.

Rotary models rotate queries and keys by their position before attention sees them (Su et al., arXiv 2104.09864), so
q·k depends on the distance between the two. Everything here goes through the model's own rotary functions, so its
variant (scaled, partial, interleaved) is that of the model.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import nn

Angles = tuple[torch.Tensor, torch.Tensor]  # cos and sin, (rows or 1, n, rotated dim)


class Rotary:
    """The rotary embedding of one attention layer.

    Parameters
    ----------
    embedding : nn.Module
        Gives (cos, sin) of positions; copied, since some variants remember the longest position they met.
    apply : callable
        `apply_rotary_pos_emb(q, k, cos, sin)` of the model's own source file.
    layer_type : str or None
        For models that rotate some of their layers otherwise.
    """

    def __init__(self, embedding: nn.Module, apply: Any, layer_type: str | None):
        self.embedding, self.apply = copy.deepcopy(embedding), apply
        self.extra = {} if layer_type is None else {"layer_type": layer_type}

    def angles(self, positions: torch.Tensor, like: torch.Tensor) -> Angles:
        """cos and sin of `positions` (rows, n), in the dtype of `like`."""
        return self.embedding.to(like.device)(like, positions, **self.extra)

    def turn(self, vectors: torch.Tensor, old: Angles, new: Angles) -> torch.Tensor:
        """`vectors` (rows, heads, n, dim), rotated by `old`, as if they had been rotated by `new`."""
        width = old[0].shape[-1]  # some models rotate only the first few dimensions
        turned, rest = vectors[..., :width].to(torch.float32), vectors[..., width:]
        cos, sin = (a.to(torch.float32) for a in old)
        square = (cos[..., :1] ** 2 + sin[..., :1] ** 2)[:, None]  # some variants also scale, once in every rotation
        turned = self._rotate(turned, (cos, -sin)) / square
        turned = self._rotate(turned, tuple(a.to(torch.float32) for a in new)).to(vectors.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _rotate(self, vectors: torch.Tensor, angles: Angles) -> torch.Tensor:
        return self.apply(vectors, vectors[:, :0], *angles)[0]


def find_rotary(model: nn.Module, attention: nn.Module) -> Rotary | None:
    """The rotary embedding that `attention`, a layer of `model`, uses; None for a model with learned positions."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    embedding = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    if apply is None or embedding is None:
        return None
    by_type = "layer_type" in inspect.signature(type(embedding).forward).parameters
    kinds = getattr(attention.config, "layer_types", None)
    return Rotary(embedding, apply, kinds[attention.layer_idx] if by_type and kinds else None)
