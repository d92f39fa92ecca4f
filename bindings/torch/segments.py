"""What all layers with memory share: documents cut into segments, whatever calls they come in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...backends.errors import ArgumentError, DTypeError, FrameworkError, ShapeError
from ...core import checks
from ...core.segments import numbers
from .state import State


class SegmentedAttention(nn.Module):
    """Causal self-attention over documents read segment by segment, with a memory of what came before.

    A subclass says what a fresh memory is (`memory`), and how tokens that cross no boundary between segments attend
    (`_attend`). Calls may be cut anywhere: boundaries lie at every `segment` tokens of each row's own document, so one
    call, many, and token by token give the same outputs.

    Parameters
    ----------
    dim : int
        Width of the input and output.
    heads : int
    head_dim : int, optional
        dim / heads by default.
    segment : int
        Tokens between two writes to memory.
    reach : int
        Tokens before the current segment that local attention still sees.
    """

    def __init__(self, dim: int, heads: int, head_dim: int | None, segment: int, reach: int):
        super().__init__()
        self.dim, self.heads = checks.count("dim", dim), checks.count("heads", heads)
        if head_dim is None and dim % heads:
            raise ArgumentError("heads", f"a divisor of dim={dim}", str(heads), "Or pass head_dim.")
        self.head_dim = dim // heads if head_dim is None else checks.count("head_dim", head_dim)
        self.segment, self.reach = checks.count("segment", segment), checks.count("window", reach, least=0)
        self.settings: dict[str, Any] = {"segment": self.segment, "window": self.reach}

    def memory(self, rows: int) -> State:
        """A fresh memory for `rows` documents, on the device and in the dtype of the parameters."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        memory: State | None = None,
        start: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Attend, and remember.

        Parameters
        ----------
        x : tensor (rows, n, dim)
            The next n tokens of every row; any n.
        memory : State, optional
            What the previous call returned; a fresh one by default.
        start : bool tensor (rows,), optional
            True where a new document begins with x: that row forgets everything first.
        mask : bool tensor (rows, n), optional
            False is padding, anywhere: never attended to, never remembered, and 0 in the output.

        Returns
        -------
        output : tensor (rows, n, dim)
        memory : State
            For the next call, in place of the one passed in; no gradient reaches past the call.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, ArgumentError, NonFiniteError
            In every case nothing has been remembered, but where what a layer makes of x is too large to be stored: then
            the segments before it are.
        """
        self._check(x, memory, start, mask)
        if memory is None:
            memory = self.memory(x.shape[0])
        if x.shape[1] == 0:  # a call of no tokens is a call of one column of padding
            nothing = torch.zeros((x.shape[0], 1), dtype=torch.bool, device=x.device)
            output, memory = self.forward(x.new_zeros((x.shape[0], 1, self.dim)), memory, start, nothing)
            return output[:, :0], memory
        outputs, losses, n = [], [], x.shape[1]
        even = not memory.ragged and mask is None and (start is None or memory.phase == 0)
        if memory.phase + n <= self.segment:
            cuts: list[int] = []  # as `even` would have it too; so told, one compiled graph serves every phase
        elif even:
            cuts = list(range(self.segment - memory.phase, n, self.segment))
        elif torch.compiler.is_compiling():  # where boundaries lie is in the data, which a graph cannot ask
            return self._twice(x, memory, start, mask)
        else:
            cuts = self._crossings(n, memory.position, start, mask)
        turning = memory.phase == 0 or memory.ragged
        for first, last in zip([0, *cuts], [*cuts, n], strict=True):
            piece = slice(first, last)
            begin = start if first == 0 else None
            present = None if mask is None else mask[:, piece]
            output, memory = self._step(x[:, piece], memory, begin, present, turning or first > 0)
            outputs.append(output)
            losses.append(getattr(memory, "loss", None))
        if cuts and memory.ragged:
            phases = set((memory.position % self.segment).tolist())
            memory = memory.following(phase=max(phases), ragged=len(phases) > 1)
        memory = averaged(memory, losses)
        output = torch.cat(outputs, dim=1) if len(outputs) != 1 else outputs[0]
        return output, memory

    def _twice(self, x: torch.Tensor, memory: State, start: Any, mask: Any) -> tuple[torch.Tensor, State]:
        """At most a segment of columns at a time, of each row first what comes before its boundary, then the rest.

        The same outputs as pieces cut where the data says, in a graph that does not depend on it, for twice the work.
        """
        outputs, losses, n = [], [], x.shape[1]
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        for first in range(0, n, self.segment):
            piece, begin = slice(first, first + self.segment), start if first == 0 else None
            present = mask[:, piece]
            position = memory.position if begin is None else torch.where(begin, 0, memory.position)
            boundary = (position // self.segment + 1) * self.segment
            before = present & (numbers(position, 0, present.shape[1], present) < boundary[:, None])
            output, memory = self._step(x[:, piece], memory, begin, before, True)
            losses.append(getattr(memory, "loss", None))
            after = present & ~before
            rest, memory = self._step(x[:, piece], memory, None, after, True)
            losses.append(getattr(memory, "loss", None))
            outputs.append(output + rest)
        memory = memory.following(phase=self.segment, ragged=True)  # as far as a graph can tell
        return torch.cat(outputs, dim=1), averaged(memory, losses)

    def _step(
        self, x: torch.Tensor, memory: State, start: Any, present: Any, turning: bool
    ) -> tuple[torch.Tensor, State]:
        """One piece: no row crosses a boundary in it but with its first token, where `turning`."""
        if present is not None:
            x = torch.where(present[..., None], x, 0)
        memory = memory.following() if start is None else memory.restarted(start)
        position = memory.position
        output, kept = self._attend(x, memory, start, present, turning)
        if present is not None:
            output = torch.where(present[..., None], output, 0)
        new = x.shape[1] if present is None else present.sum(dim=1)
        ragged = memory.ragged or present is not None or (start is not None and memory.phase > 0)
        phase = memory.phase + x.shape[1]
        if not ragged:
            phase %= self.segment
        return output, memory.following(position=position + new, phase=phase, ragged=ragged, **kept)

    def _attend(
        self, x: torch.Tensor, memory: Any, start: Any, present: Any, turning: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Output (rows, n, dim), and the fields of the next state other than the progress.

        A loss among them is a tensor (2,): a sum, and over how many it is one.
        """
        raise NotImplementedError

    def _crossings(self, n: int, position: torch.Tensor, start: Any, mask: Any) -> list[int]:
        """Columns other than the first at which the token of any row begins a segment."""
        if start is not None:
            position = torch.where(start, 0, position)
        begins = numbers(position, 0, n, mask) % self.segment == 0
        if mask is not None:
            begins &= mask
        begins[:, :1] = False
        return begins.any(dim=0).nonzero().flatten().tolist()

    def _check(self, x: Any, memory: Any, start: Any, mask: Any) -> None:
        if not isinstance(x, torch.Tensor):
            raise FrameworkError("x", "a torch.Tensor", type(x).__name__, "Pass torch.as_tensor(x).")
        checks.floating_arrays(x=x)
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ShapeError("x", f"shape (rows, n, {self.dim})", str(tuple(x.shape)), "Give each row its tokens.")
        for name, given, shape in (("start", start, x.shape[:1]), ("mask", mask, x.shape[:2])):
            if given is None:
                continue
            if not isinstance(given, torch.Tensor) or given.dtype != torch.bool:
                came = getattr(given, "dtype", type(given).__name__)
                raise DTypeError(name, "a bool tensor", str(came), f"Pass {name}.bool().")
            if given.shape != shape:
                raise ShapeError(name, str(tuple(shape)), str(tuple(given.shape)), "Order is causal; pass one a token.")
            if given.device != x.device:
                raise FrameworkError(name, f"a tensor on {x.device}, as x is", f"one on {given.device}", "Move it.")
        weight = next(self.parameters())
        if x.device != weight.device:
            raise FrameworkError(
                "x", f"a tensor on {weight.device}, as the layer is", f"one on {x.device}", "Move x or the layer."
            )
        casts = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        if x.dtype != weight.dtype and not casts:
            raise DTypeError(
                "x",
                f"{weight.dtype}, as the layer is",
                str(x.dtype),
                f"Pass x.to({weight.dtype}), or use torch.autocast.",
            )
        if memory is not None:
            kind = self._kind()
            if not isinstance(memory, kind):
                raise ArgumentError("memory", f"a {kind.__name__}", type(memory).__name__, "Pass what the layer gave.")
            memory.fits(x, self.settings, self._shapes())
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            checks.finite(x=x.detach() if mask is None else torch.where(mask[..., None], x.detach(), 0))

    def _kind(self) -> type[State]:
        """Class of the layer's states."""
        raise NotImplementedError

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the layer's states, rows aside."""
        return {"position": ()}

    def _seen(self, memory: State) -> int:
        """How many columns of the window the next piece may see."""
        return self.reach + (self.segment - 1 if memory.ragged else memory.phase)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, n, heads x head_dim) -> (rows, heads, n, head_dim), however many heads that are"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, heads, n, head_dim) -> (rows, n, heads x head_dim)"""
        return x.transpose(1, 2).flatten(2)


def averaged(memory: State, losses: list[Any]) -> State:
    """`memory` with the mean loss of a call whose pieces had `losses`, (sum, count) each or None."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return memory
    total, count = torch.stack(known).sum(dim=0)
    return memory.following(loss=total / count.clamp(min=1))


def even(argument: str, value: int) -> None:
    """`value` is a multiple of 2, half of it sines and half cosines.

    Raises
    ------
    ArgumentError
    """
    if value % 2:
        raise ArgumentError(argument, "an even number", str(value), f"Pass {argument}={value + 1}.")
