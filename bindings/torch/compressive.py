"""Attention over the current segment, the hidden states before it, and older ones compressed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...backends.errors import ArgumentError
from ...core import checks
from ...core.attention import masked_softmax
from ...core.compression import METHODS, compressed, layers_for, most_used
from ...core.segments import numbers, slide, visible
from .local import local_attention
from .state import State
from .transformer_xl import RecurrentState, TransformerXLAttention


@dataclass(frozen=True, eq=False)
class CompressiveState(RecurrentState):
    """The newest hidden states, and the compressed ones before them.

    Attributes
    ----------
    compressed : tensor (rows, compressed, dim)
        The newest last; zeros where there are fewer. Without a gradient.
    usage : tensor (rows, window)
        How much attention each hidden state has drawn; only kept by "most_used".
    loss : tensor () or None
        Reconstruction loss of the call that returned this state: the mean over the segments it completed, for adding to
        the loss. Neither copied nor saved.
    """

    compressed: torch.Tensor
    usage: torch.Tensor
    loss: torch.Tensor | None = None

    @classmethod
    def _made(cls) -> set[str]:
        return {"loss"}


class CompressiveAttention(TransformerXLAttention):
    """Transformer-XL attention that also sees what has left its window, `rate` states compressed into one.

    Parameters
    ----------
    dim, heads, head_dim, segment, window, bias
        As of TransformerXLAttention; segment and window are multiples of `rate`.
    compressed : int
        Compressed states held per row; the oldest are forgotten.
    rate : int
        c: how many states become one.
    method : {"conv", "mean", "max", "dilated", "most_used"}
        How; see `perdure.core.compression`.

    Raises
    ------
    ArgumentError

    Notes
    -----
    As a segment is completed, `segment` states leave the window and are compressed. `memory.loss` of that call is the
    attention-reconstruction loss: how far what its queries see in the compressed states is from what they see in those
    that left. It trains the compressor and nothing else, and nothing else trains the compressor.
    Source: Rae et al., "Compressive Transformers" (ICLR 2020, arXiv 1911.05507), section 3. Differs from the paper in
    counting segments in each row's own tokens.

    Examples
    --------
    >>> import torch
    >>> from perdure.bindings.torch import CompressiveAttention
    >>> layer = CompressiveAttention(dim=16, heads=2, segment=8, window=8, compressed=4, rate=4)
    >>> memory = None
    >>> for x in torch.randn(3, 1, 8, 16):
    ...     output, memory = layer(x, memory)
    >>> memory.compressed.shape, memory.loss.requires_grad
    (torch.Size([1, 4, 16]), True)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        segment: int = 512,
        window: int = 512,
        compressed: int = 512,
        rate: int = 4,
        method: str = "conv",
        head_dim: int | None = None,
        bias: bool = False,
    ):
        super().__init__(dim, heads, segment=segment, window=window, head_dim=head_dim, bias=bias)
        self.compressed, self.rate = checks.count("compressed", compressed), checks.count("rate", rate)
        self.method = checks.choice("method", method, METHODS)
        self.settings |= {"rate": self.rate, "method": self.method}
        for name, value, whole in (
            ("segment", self.segment, self.rate),
            ("window", self.reach, self.segment if method == "most_used" else self.rate),
        ):
            if value % whole:
                raise ArgumentError(name, f"a multiple of {whole}", str(value), "Or choose another rate or method.")
        depth = layers_for(self.rate)
        shapes: dict[str, tuple[Any, ...]] = {
            "conv": ((dim, dim, self.rate), (dim,)),
            "dilated": ((depth, dim, dim, 2), (depth, dim)),
        }
        self.compressor = nn.ParameterList(torch.empty(shape) for shape in shapes.get(method, ()))
        for weight in self.compressor:
            nn.init.uniform_(weight, -1 / math.sqrt(dim * self.rate), 1 / math.sqrt(dim * self.rate))

    def memory(self, rows: int) -> CompressiveState:
        """A fresh memory for `rows` documents."""
        return CompressiveState(**self._fresh(rows))

    def _kind(self) -> type[State]:
        return CompressiveState

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        window = self.segment + self.reach
        return {
            "position": (),
            "hidden": (window, self.dim),
            "compressed": (self.compressed, self.dim),
            "usage": (window if self.method == "most_used" else 0,),
        }

    def _furthest(self) -> int:
        return self.segment - 1 + self.reach + self.compressed

    def _attend(
        self, x: torch.Tensor, memory: Any, start: Any, present: Any, turning: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        n, seen, older = x.shape[1], self._seen(memory), self.compressed
        context = [memory.compressed, memory.hidden[:, memory.hidden.shape[1] - seen :]]
        context = torch.cat([*(a.to(x.dtype) for a in context), x], dim=1)
        tokens = numbers(memory.position, seen, n, present)
        # compressed states count as the tokens just before the window, whatever they stand for
        left = memory.position // self.segment * self.segment - self.reach  # tokens that have left the window
        back = torch.arange(older, 0, -1, device=x.device)
        held = back <= (left.clamp(min=0) // self.rate)[:, None]  # (rows, compressed)
        allowed = torch.cat([held[:, None].expand(-1, n, -1), visible(tokens, n, self.segment, self.reach)], dim=2)
        successive = None if memory.ragged or present is not None else older + seen + n
        queries, bias, keys, values = self._scored(
            x, context, torch.cat([left[:, None] - back, tokens], dim=1), successive
        )
        attended = local_attention(queries, keys, values, allowed, 1.0, bias)
        kept = {"hidden": slide(memory.hidden, x.detach(), present), "usage": memory.usage}
        if self.method == "most_used":
            with torch.no_grad():
                weights, _ = masked_softmax(queries @ keys.mT + bias, allowed[:, None])
            kept["usage"] = self._used(memory, weights, seen, present)
        position = memory.position + (n if present is None else present.sum(dim=1))
        if memory.ragged or present is not None or (memory.phase + n) % self.segment == 0:
            kept |= self._compressed(memory, kept, position)
        return self.output(self._joined(attended)), kept

    def _used(self, memory: CompressiveState, weights: torch.Tensor, seen: int, present: Any) -> torch.Tensor:
        """Attention that every state of the next window has drawn, (rows, window)."""
        n = weights.shape[2]
        if present is not None:
            weights = weights * present[:, None, :, None]
        drawn = weights.sum(dim=(1, 2))[:, self.compressed :].to(memory.usage.dtype)  # (rows, seen + n)
        past = memory.usage + nn.functional.pad(drawn[:, :seen], (memory.usage.shape[1] - seen, 0))
        return slide(past[..., None], drawn[:, drawn.shape[1] - n :, None], present)[..., 0]

    def _compressed(self, memory: CompressiveState, kept: dict[str, Any], position: torch.Tensor) -> dict[str, Any]:
        """The fields that change where a row has completed a segment."""
        hidden = kept["hidden"]
        with torch.autocast(hidden.device.type, enabled=False):
            gone, read = hidden[:, : self.segment], hidden[:, -self.segment :]  # what leaves the window, what was read
            weights = tuple(weight.to(gone.dtype) for weight in self.compressor)
            if self.method == "most_used":
                made = most_used(gone, self.rate, kept["usage"][:, : self.segment])
            else:
                made = compressed(gone, self.rate, self.method, weights)
            ended = (position > memory.position) & (position % self.segment == 0)
            following = torch.cat([memory.compressed, made.detach()], dim=1)[:, -self.compressed :]
            real = ended & (position >= self.segment + self.reach)  # rows of which all that left were tokens
            loss = self._reconstruction(read, gone, made, real) if weights else None
        return {"compressed": torch.where(ended[:, None, None], following, memory.compressed), "loss": loss}

    def _reconstruction(
        self, read: torch.Tensor, gone: torch.Tensor, made: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """Mean squares of what the segment `read` sees in `made` less what it sees in `gone`: their sum over real rows.

        Second, how many those are. Gradients reach `made` alone.
        """
        query, key, value = (
            tuple(None if a is None else a.detach().to(gone.dtype) for a in (p.weight, p.bias))
            for p in (self.query, self.key, self.value)
        )
        queries = self._heads(nn.functional.linear(read, *query)) + self.content_bias.detach()[:, None].to(gone.dtype)
        scale = 1 / math.sqrt(self.head_dim)

        def seen(states: torch.Tensor) -> torch.Tensor:
            keys, values = (self._heads(nn.functional.linear(states, *p)) for p in (key, value))
            return nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale)

        error = (seen(made) - seen(gone).detach()).square().mean(dim=(1, 2, 3))
        return torch.stack([torch.where(real, error, 0).sum(), real.sum().to(error.dtype)])
