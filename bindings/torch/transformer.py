"""A small language model whose layers each have the memory they are given, to train and compare them on equal terms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...backends.errors import ArgumentError, DTypeError, FrameworkError, ShapeError
from ...core import checks
from .segments import SegmentedAttention
from .state import State


class MemoryTransformer(nn.Module):
    """Pre-norm decoder: embedding, one block for each attention layer given, and a head tied to the embedding.

    Parameters
    ----------
    vocabulary : int
        Number of different tokens.
    layers : iterable of SegmentedAttention
        From the first to the last, all of one `dim`; they tell positions apart, the model adds none.
    hidden : int
        Width of a block's hidden layer, in multiples of `dim`.
    dropout : float
        Of every block's two outputs, and of the embedding.
    checkpointing : bool
        Recompute every block in the backward pass instead of keeping what it computed.

    Raises
    ------
    ArgumentError

    Examples
    --------
    >>> import torch
    >>> from perdure.bindings.torch import MemorizingAttention, MemoryTransformer, TransformerXLAttention
    >>> model = MemoryTransformer(256, [
    ...     MemorizingAttention(32, heads=4, segment=64, window=64, capacity=4096, positions="t5"),
    ...     TransformerXLAttention(32, heads=4, segment=64, window=64),
    ... ])
    >>> memory = model.memory(rows=2)
    >>> for tokens in torch.randint(256, (2, 192)).split(64, dim=1):
    ...     logits, memory = model(tokens, memory)
    >>> logits.shape
    torch.Size([2, 64, 256])
    """

    def __init__(
        self,
        vocabulary: int,
        layers: Iterable[SegmentedAttention],
        *,
        hidden: int = 4,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        layers = list(layers) if isinstance(layers, Iterable) else []
        if not layers or not all(isinstance(layer, SegmentedAttention) for layer in layers):
            kinds = ", ".join(type(layer).__name__ for layer in layers) or "none"
            raise ArgumentError("layers", "at least one attention layer, and only such", kinds, "See the example.")
        if len({layer.dim for layer in layers}) > 1:
            raise ArgumentError("layers", "one dim", str([layer.dim for layer in layers]), "Build them alike.")
        if not 0 <= (dropout if isinstance(dropout, int | float) else math.nan) < 1:
            raise ArgumentError(
                "dropout", "a number from 0 to below 1", repr(dropout), "Pass dropout=0.1, for example."
            )
        dim = layers[0].dim
        self.embedding = nn.Embedding(checks.count("vocabulary", vocabulary), dim)
        self.blocks = nn.ModuleList(Block(layer, checks.count("hidden", hidden) * dim, dropout) for layer in layers)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.checkpointing = checks.flag("checkpointing", checkpointing)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)  # so that the tied head's scores start near 1

    def memory(self, rows: int) -> tuple[State, ...]:
        """A fresh memory for `rows` documents: one state a layer."""
        return tuple(block.attention.memory(rows) for block in self.blocks)

    def forward(
        self,
        tokens: torch.Tensor,
        memory: tuple[State, ...] | None = None,
        start: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[State, ...]]:
        """Scores of every next token.

        Parameters
        ----------
        tokens : int64 tensor (rows, n)
            The next n tokens of every row.
        memory : tuple of State, optional
            What the previous call returned; a fresh one by default.
        start : bool tensor (rows,), optional
            True where a new document begins.
        mask : bool tensor (rows, n), optional
            False is padding, whatever its tokens are.

        Returns
        -------
        logits : tensor (rows, n, vocabulary)
        memory : tuple of State
            For the next call.

        Raises
        ------
        DTypeError, ShapeError, FrameworkError, ArgumentError
        """
        if not isinstance(tokens, torch.Tensor):
            raise FrameworkError("tokens", "a torch.Tensor", type(tokens).__name__, "Pass torch.as_tensor(tokens).")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise DTypeError("tokens", "integers", str(tokens.dtype), "Pass tokens.long().")
        if tokens.ndim != 2:
            raise ShapeError("tokens", "shape (rows, n)", str(tuple(tokens.shape)), "Give each row its tokens.")
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == tokens.shape:
            tokens = torch.where(mask.to(tokens.device), tokens, 0)  # padding may hold anything
        if not torch.compiler.is_compiling():
            checks.within("tokens", tokens, 0, self.embedding.num_embeddings - 1)
        if memory is None:
            memory = self.memory(tokens.shape[0])
        if not isinstance(memory, tuple | list) or len(memory) != len(self.blocks):
            came = str(len(memory)) if isinstance(memory, tuple | list) else f"a {type(memory).__name__}"
            raise ArgumentError("memory", f"a tuple of {len(self.blocks)} states", came, "Pass what the model gave.")
        x, following = self.dropout(self.embedding(tokens)), []
        for block, state in zip(self.blocks, memory, strict=True):  # all of them before any has read
            block.attention._check(x, state, start, mask)
        for block, state in zip(self.blocks, memory, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x, state = checkpoint(block, x, state, start, mask, use_reentrant=False)
            else:
                x, state = block(x, state, start, mask)
            following.append(state)
        return nn.functional.linear(self.norm(x), self.embedding.weight), tuple(following)

    def memory_state_dict(self, memory: tuple[State, ...]) -> dict[str, torch.Tensor]:
        """`memory` as one flat dict of tensors, the names led by the number of the layer."""
        return {f"{i}.{name}": tensor for i, s in enumerate(memory) for name, tensor in s.state_dict().items()}

    def memory_from_state_dict(self, state: dict[str, Any]) -> tuple[State, ...]:
        """The memory that `memory_state_dict` described as `state`; the model continues from it bit by bit.

        Raises
        ------
        ArgumentError
        """
        if not isinstance(state, dict):
            raise ArgumentError("state", "what memory_state_dict gave", type(state).__name__, "Pass it unaltered.")
        parts: list[dict[str, Any]] = [{} for _ in self.blocks]
        for name, tensor in state.items():
            number, _, rest = name.partition(".")
            if not number.isdecimal() or int(number) >= len(parts):
                raise ArgumentError("state", f"names led by a layer below {len(parts)}", name, "Pass it unaltered.")
            parts[int(number)][rest] = tensor
        kinds = (block.attention._kind() for block in self.blocks)
        return tuple(kind.from_state_dict(part) for kind, part in zip(kinds, parts, strict=True))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: SegmentedAttention, hidden: int, dropout: float):
        super().__init__()
        dim = attention.dim
        self.attention_norm, self.attention = nn.LayerNorm(dim), attention
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, memory: State, start: Any, mask: Any) -> tuple[torch.Tensor, State]:
        attended, memory = self.attention(self.attention_norm(x), memory, start, mask)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), memory
