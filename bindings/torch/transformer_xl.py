"""Attention over the current segment and the hidden states before it, by relative positions: Transformer-XL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core import checks
from ...core.relative import relative_scores, shifted_scores, sinusoids
from ...core.segments import numbers, slide, visible
from .local import local_attention
from .segments import SegmentedAttention, even
from .state import State


@dataclass(frozen=True, eq=False)
class RecurrentState(State):
    """The newest hidden states.

    Attributes
    ----------
    hidden : tensor (rows, window, dim)
        Inputs of the layer, without a gradient.
    """

    hidden: torch.Tensor


class TransformerXLAttention(SegmentedAttention):
    """Causal attention that sees a window of past hidden states, and knows by how much each is past.

    Parameters
    ----------
    dim, heads, head_dim
        Width, heads, and width of a head (dim / heads by default).
    segment : int
        Tokens that share one view of the past.
    window : int
        Hidden states before the segment that its tokens see.
    bias : bool
        Whether the projections have biases; the relative positions have none.

    Raises
    ------
    ArgumentError

    Notes
    -----
    A call of n tokens costs O(n (segment + window)) of attention and projects the window anew. No gradient reaches the
    window. Source: Dai et al., "Transformer-XL" (ACL 2019, arXiv 1901.02860), section 3.3. Differs from the paper in
    that segments are counted in each row's own tokens, so that padding and the cut into calls change nothing.

    Examples
    --------
    >>> import torch
    >>> from perdure.bindings.torch import TransformerXLAttention
    >>> layer = TransformerXLAttention(dim=16, heads=2, segment=8, window=8)
    >>> memory = None
    >>> for x in torch.randn(3, 1, 8, 16):
    ...     output, memory = layer(x, memory)
    >>> memory.position
    tensor([24])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        segment: int = 512,
        window: int = 512,
        head_dim: int | None = None,
        bias: bool = False,
    ):
        super().__init__(dim, heads, head_dim, segment, checks.count("window", window, least=0))
        even("dim", self.dim)
        inner = self.heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.output = nn.Linear(inner, dim, bias=bias)
        self.relative = nn.Linear(dim, inner, bias=False)  # W_{k,R}
        self.content_bias = nn.Parameter(torch.zeros(self.heads, self.head_dim))  # u
        self.position_bias = nn.Parameter(torch.zeros(self.heads, self.head_dim))  # v

    def memory(self, rows: int) -> RecurrentState:
        """A fresh memory for `rows` documents."""
        return RecurrentState(**self._fresh(rows))

    def _fresh(self, rows: int) -> dict[str, Any]:
        """Every field of a fresh memory."""
        rows, like = checks.count("rows", rows), self.query.weight
        shapes = {name: (rows, *shape) for name, shape in self._shapes().items() if name != "position"}
        position = torch.zeros(rows, dtype=torch.int64, device=like.device)
        zeros = {name: like.new_zeros(shape) for name, shape in shapes.items()}
        return {"position": position, "phase": 0, "ragged": False, "settings": self.settings, **zeros}

    def _kind(self) -> type[State]:
        return RecurrentState

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"position": (), "hidden": (self.segment - 1 + self.reach, self.dim)}

    def _attend(
        self, x: torch.Tensor, memory: Any, start: Any, present: Any, turning: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        n, seen = x.shape[1], self._seen(memory)
        context = torch.cat([memory.hidden[:, memory.hidden.shape[1] - seen :].to(x.dtype), x], dim=1)
        tokens = numbers(memory.position, seen, n, present)
        successive = None if memory.ragged or present is not None else seen + n
        allowed = visible(tokens, n, self.segment, self.reach)
        queries, bias, keys, values = self._scored(x, context, tokens, successive)
        attended = local_attention(queries, keys, values, allowed, 1.0, bias)
        return self.output(self._joined(attended)), {"hidden": slide(memory.hidden, x.detach(), present)}

    def _scored(
        self, x: torch.Tensor, context: torch.Tensor, tokens: torch.Tensor, successive: int | None
    ) -> tuple[torch.Tensor, ...]:
        """What attention of the newest columns x over `context` (rows, columns, dim), being `tokens`, is made of.

        `successive`: the number of columns, when they are successive tokens in every row. Returns scaled queries
        (rows, heads, n, d), the bias of their scores (rows, heads, n, columns), keys and values.
        """
        n, scale = x.shape[1], 1 / math.sqrt(self.head_dim)
        queries, keys, values = (
            self._heads(project(a)) for project, a in ((self.query, x), (self.key, context), (self.value, context))
        )
        queries = queries * scale
        embedded = self._embedded(successive or self._furthest() + 1, x).to(queries.dtype)
        content, position = (
            queries + scale * bias[:, None].to(queries.dtype) for bias in (self.content_bias, self.position_bias)
        )
        if successive:
            bias = shifted_scores(position, embedded)
        else:
            bias = relative_scores(position, embedded, tokens[:, -n:, None] - tokens[:, None, :])
        return content, bias, keys, values

    def _embedded(self, most: int, x: torch.Tensor) -> torch.Tensor:
        """r of the distances 0 ... most - 1, (heads, most, head_dim)."""
        distances = torch.arange(most, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        embedded = self.relative(sinusoids(distances, self.dim).to(x.dtype))
        return embedded.unflatten(-1, (self.heads, self.head_dim)).transpose(0, 1)

    def _furthest(self) -> int:
        """The largest distance at which a token is seen."""
        return self.segment - 1 + self.reach
