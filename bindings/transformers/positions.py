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

from ...backends.errors import ArgumentError

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
    times : int
        Dimensions rotated for each number that cos has; some models give each number once for the two it rotates.
    """

    def __init__(self, embedding: nn.Module, apply: Any, layer_type: str | None, times: int = 1):
        self.embedding, self.apply, self.times = copy.deepcopy(embedding), apply, times
        self.extra = {} if layer_type is None else {"layer_type": layer_type}

    def angles(self, positions: torch.Tensor, like: torch.Tensor) -> Angles:
        """cos and sin of `positions` (rows, n), in the dtype of `like`."""
        return self.embedding.to(like.device)(like, positions, **self.extra)

    def turn(self, vectors: torch.Tensor, old: Angles, new: Angles) -> torch.Tensor:
        """`vectors` (rows, heads, n, dim), rotated by `old`, as if they had been rotated by `new`."""
        width = self.times * old[0].shape[-1]  # some models rotate only the first few dimensions
        turned, rest = vectors[..., :width].to(torch.float32), vectors[..., width:]
        cos, sin = (a.to(torch.float32) for a in old)
        square = (cos[..., :1] ** 2 + sin[..., :1] ** 2)[:, None]  # some variants also scale, once in every rotation
        turned = self._rotate(turned, (cos, -sin)) / square
        turned = self._rotate(turned, tuple(a.to(torch.float32) for a in new)).to(vectors.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _rotate(self, vectors: torch.Tensor, angles: Angles) -> torch.Tensor:
        return self.apply(vectors, vectors[:, :0], *angles)[0]


def find_rotary(model: nn.Module, attention: nn.Module) -> Rotary | None:
    """The rotary embedding that `attention`, a layer of `model`, uses; None for a layer that rotates nothing.

    Raises
    ------
    ArgumentError
        Keys that the functions found do not turn as the layer itself does.
    """
    embedding = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    received = type(model).__name__
    if embedding is None:
        return None
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is not None and "position_embeddings" in inspect.signature(type(attention).forward).parameters:
        by_type = "layer_type" in inspect.signature(type(embedding).forward).parameters
        kinds = getattr(attention.config, "layer_types", None)
        kind = kinds[attention.layer_idx] if by_type and kinds else None
        like = computed_in(model, attention)
        if like.is_meta:  # nothing can be tried
            return Rotary(embedding, apply, kind)
        for times in (1, 2):
            rotary = Rotary(embedding, apply, kind, times)
            try:
                near, far = (keys_of(attention, rotary, position, like) for position in NEAR_AND_FAR)
                if not near.any():  # it would be the same wherever it stood
                    received += ", a layer of which gives keys of zeros"
                    break
                if torch.equal(near, far):
                    return None
                turned = rotary.turn(far, *(rotary.angles(at(position, far), far) for position in NEAR_AND_FAR[::-1]))
            except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
                continue
            if float((turned - near).abs().max()) < CLOSE * float(near.abs().max()):
                return rotary
    remedy = "Attach memory to a model that attends once a layer, to whole keys that its apply_rotary_pos_emb rotates."
    raise ArgumentError("model", "keys whose rotation can be undone", received, remedy)


NEAR_AND_FAR = 1, 12  # positions at which a layer is tried
CLOSE = 0.05  # of the largest number: what half precision may do to a key; another rotation changes it by as much


def computed_in(model: nn.Module, attention: nn.Module) -> torch.Tensor:
    """An empty tensor of the dtype that `attention`, a layer of `model`, computes in, where it does.

    Quantised weights are integers or small floating-point numbers, and tell nothing of what is computed with them.
    """
    every = [*attention.parameters(), *model.parameters()]
    dtype = next((p.dtype for p in every if p.is_floating_point() and p.element_size() > 1), None)
    return torch.empty(0, dtype=dtype, device=every[0].device)


def keys_of(attention: nn.Module, rotary: Rotary, position: int, like: torch.Tensor) -> torch.Tensor:
    """The key (1, heads, 1, dim) that a layer computes of a vector `like` this, always the same, at `position`."""
    width = attention.config.hidden_size
    given = torch.linspace(-1, 1, width).mul(17).sin()[None, None].to(like.device, like.dtype)
    caught: list[torch.Tensor] = []  # a layer that attends more than once would have several memories to keep
    with torch.no_grad():
        attention(
            hidden_states=given,
            position_embeddings=rotary.angles(at(position, given), given),
            attention_mask=None,
            perdure_caught=caught,
        )
    if len(caught) != 1:
        raise LookupError("one call of attention")
    return caught[0]


def at(position: int, like: torch.Tensor) -> torch.Tensor:
    """One position, as rotary embeddings take it."""
    return torch.full((1, 1), position, device=like.device)
