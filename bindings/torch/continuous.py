"""Attention to a continuous signal of everything read, beside attention to the last segments: the ∞-former."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...backends.errors import ArgumentError
from ...backends.exchange import like
from ...core import checks, looking, original
from ...core.basis import Basis, gaussian_basis, gaussians
from ...core.consolidation import Scheme
from ...core.density import DENSITIES, expected_basis, interval_mass
from ...core.expectation import fewer_places
from ...core.positions import systematic
from ...core.signal import penalty
from .state import State
from .transformer_xl import RecurrentState, TransformerXLAttention

COMPATIBLE = ("infinite-former",)


@dataclass(frozen=True, eq=False)
class ContinuousState(RecurrentState):
    """The newest hidden states, and the signal of all before them.

    Attributes
    ----------
    coefficients : tensor (rows, N, dim)
        B, without a gradient.
    histogram : tensor (rows, D)
        Where the segment's queries have looked so far, over D equal bins of [0, 1].
    loss : tensor () or None
        Regulariser of the call that returned this state, weighted: the mean over the tokens that had a signal to look
        at, for adding to the loss. Neither copied nor saved.
    """

    coefficients: torch.Tensor
    histogram: torch.Tensor
    loss: torch.Tensor | None = None

    @classmethod
    def _made(cls) -> set[str]:
        return {"loss"}


class ContinuousAttention(TransformerXLAttention):
    """Transformer-XL attention plus attention, by a density on [0, 1], to a signal of unbounded length and fixed size.

    Parameters
    ----------
    dim, heads, head_dim, segment, window, bias
        As of TransformerXLAttention. A segment enters the signal when it is complete.
    basis : int or Basis
        How many Gaussians, or which functions.
    contraction : float
        tau in (0, 1): what a new segment leaves of the room to the old signal.
    ridge : float
        Relative penalty of every fit.
    samples : int
        M: at how many positions the old signal is looked at.
    sticky : bool
        Whether the old signal keeps more of where attention fell.
    density : {"truncated_gaussian", "gaussian", "sparsemax", "biweight"}
        Of a query's attention.
    affine : bool
        Mean and variance from learned maps of the scores, or the moments of their softmax.
    floor : float
        Least variance.
    gated : bool
        Gate a segment's hidden states by a convolution before they enter, k sigmoid(conv(k)).
    regulariser : float
        Weight of the divergence of every density from one of width `width`, in `memory.loss`.
    width, centre : float
        Of that density; the mean is left free where `centre` is None.
    compat : {"infinite-former"}, optional
        Positions, padding, penalty (`ridge` as lambda itself) and plain Gaussian of the authors' code.

    Raises
    ------
    ArgumentError

    Notes
    -----
    Beyond Transformer-XL: O(N² dim + N segment dim) a segment and O(n heads N) a call of n tokens, whatever was read
    before. Gradients reach the projections, the maps and the gate; the signal of all but the newest segment is
    detached, and the gate learns in the call that begins after its segment.
    Source: Martins et al., "∞-former: Infinite Memory Transformer" (ACL 2022, arXiv 2109.00301), section 3. Differs
    from the paper in what `compat` names, in sticky positions drawn systematically and without chance, and in counting
    segments in each row's own tokens.

    Examples
    --------
    >>> import torch
    >>> from perdure.bindings.torch import ContinuousAttention
    >>> layer = ContinuousAttention(dim=16, heads=2, segment=8, window=8, basis=32, samples=32)
    >>> memory = None
    >>> for x in torch.randn(100, 1, 8, 16):
    ...     output, memory = layer(x, memory)
    >>> memory.coefficients.shape, memory.position
    (torch.Size([1, 32, 16]), tensor([800]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        segment: int = 512,
        window: int = 0,
        basis: int | Basis = 512,
        contraction: float = 0.5,
        ridge: float = 1e-3,
        samples: int = 512,
        sticky: bool = True,
        density: str = "truncated_gaussian",
        affine: bool = True,
        floor: float = 1e-4,
        gated: bool = False,
        regulariser: float = 1e-6,
        width: float = 0.05,
        centre: float | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        compat: str | None = None,
    ):
        super().__init__(dim, heads, segment=segment, window=window, head_dim=head_dim, bias=bias)
        self.basis = basis if isinstance(basis, Basis) else gaussian_basis(checks.count("basis", basis))
        if self.basis.kind != "gaussian":
            raise ArgumentError("basis", "a Gaussian basis", repr(self.basis), "Pass perdure.gaussian_basis(n).")
        self.contraction, self.sticky = checks.number("contraction", contraction, 0, 1), sticky
        self.compat = None if compat is None else checks.choice("compat", compat, COMPATIBLE)
        self.density = "gaussian" if compat else checks.choice("density", density, DENSITIES)
        self.floor, self.width = checks.positive("floor", floor), checks.positive("width", width)
        bounds = () if compat else (0, 1)  # the authors' own lies outside of the signal
        self.centre = None if centre is None else checks.number("centre", centre, *bounds)
        self.regulariser = 0.0 if regulariser == 0 else checks.positive("regulariser", regulariser)
        for name, flag in (("sticky", sticky), ("affine", affine), ("gated", gated)):
            checks.flag(name, flag)
        self.scheme = Scheme(self.basis, penalty(ridge), checks.count("samples", samples), compat is not None)
        self.bins = original.BINS
        functions = np.stack([self.basis.centers, self.basis.widths])
        self.settings |= {"basis": f"{self.basis!r} with CRC {zlib.crc32(functions.tobytes()):08x}", "gated": gated}
        inner, N = self.heads * self.head_dim, len(self.basis)
        self.signal_key, self.signal_value = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.signal_output = nn.Linear(inner, dim, bias=False)
        self.looking_mean = nn.Parameter(torch.randn(N) / N**0.5) if affine else None
        self.looking_variance = nn.Parameter(torch.randn(N) / N**0.5) if affine else None
        self.input_gate = nn.Conv1d(dim, dim, 3, padding=1) if gated else None
        self._operators(torch.device("cpu"), torch.float64)  # refuses a basis that the segment cannot be fitted on

    def memory(self, rows: int) -> ContinuousState:
        """A fresh memory for `rows` documents."""
        fresh = self._fresh(rows)
        wide = torch.promote_types(self.query.weight.dtype, torch.float32)
        fresh |= {name: fresh[name].to(wide) for name in ("coefficients", "histogram")}
        return ContinuousState(**fresh)

    def _kind(self) -> type[State]:
        return ContinuousState

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "position": (),
            "hidden": (self.segment + self.reach, self.dim),
            "coefficients": (len(self.basis), self.dim),
            "histogram": (self.bins,),
        }

    def _attend(
        self, x: torch.Tensor, memory: Any, start: Any, present: Any, turning: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        output, kept = super()._attend(x, memory, start, present, turning)
        with torch.autocast(x.device.type, enabled=False):
            B, looked = memory.coefficients, memory.histogram
            if turning:
                reading = None if present is None else present.any(dim=1)
                B, looked = self._turned(B, looked, memory.hidden[:, -self.segment :], memory.position, reading)
            queries = self._heads(self.query(x)).to(B.dtype)
            mean, variance = self._look(queries, B)
            functions, few = B, fewer_places(self.basis, variance, self.density, mean.shape[1] * mean.shape[2])
            if few is None:
                psi = expected_basis(mean, variance, *self._functions(B.device, B.dtype), self.density)
            else:
                psi, functions = few.seen(mean, variance), few.blurred(B)
            values = self._heads(functions @ self.signal_value.weight.mT.to(B.dtype))
            read = self._joined(psi @ values).to(x.dtype)  # psi (rows, heads, n, N)
            real = memory.position >= self.segment  # rows that have a signal
            real = (real[:, None] if present is None else real[:, None] & present)[:, None].expand(mean.shape)
            loss = self._loss(mean, variance, real)
            looked = looked + self._histogram(mean, variance, real)
        return output + self.signal_output(read), {
            **kept,
            "coefficients": B.detach(),
            "histogram": looked.detach(),
            "loss": loss,
        }

    def _turned(
        self, B: torch.Tensor, looked: torch.Tensor, hidden: torch.Tensor, position: torch.Tensor, reading: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The signals with the segment `hidden` (rows, segment, dim) in them, of rows that stand at a boundary.

        A row that is not `reading` (None: all are) still stands there in the next call, and is left for it.
        """
        x = hidden.to(self.signal_key.weight.dtype)
        if self.input_gate is not None:
            x = x * torch.sigmoid(self.input_gate(x.mT).mT)
        x = x.to(B.dtype)
        first, recurrence, old, new = self._operators(B.device, B.dtype)
        if self.sticky:
            where = systematic(looked, self.scheme.looks(self.contraction))  # (rows, M)
            contracted = old @ (gaussians(where, *self._functions(B.device, B.dtype)) @ B)
        else:
            contracted = recurrence @ B
        later = contracted + new @ x
        one = (position == self.segment)[:, None, None]
        due = (position > 0) & (position % self.segment == 0)
        due = due if reading is None else due & reading
        B = torch.where(due[:, None, None], torch.where(one, first @ x, later), B)
        return B, torch.where(due[:, None], 0, looked)

    def _look(self, queries: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of every query's density, (rows, heads, n)."""
        W_K = self.signal_key.weight.unflatten(0, (self.heads, self.head_dim)).to(B.dtype)
        if self.looking_mean is None:
            centers, widths = self._functions(B.device, B.dtype)
            return looking.moments(queries, B, W_K, centers, widths, self.floor)
        w_mean, w_variance = self.looking_mean.to(B.dtype), self.looking_variance.to(B.dtype)
        return looking.affine(queries, B, W_K, w_mean, w_variance, self.floor)

    def _loss(self, mean: torch.Tensor, variance: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Summed divergence of the densities of real queries, weighted, and how many they are."""
        each = looking.divergence(mean, variance, self.width, self.centre)
        return torch.stack([self.regulariser * torch.where(real, each, 0).sum(), real.sum().to(each.dtype)])

    def _histogram(self, mean: torch.Tensor, variance: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Mass of the densities of real queries in each bin, (rows, D)."""
        edges = torch.arange(self.bins + 1, dtype=mean.dtype, device=mean.device) / self.bins
        mass = interval_mass(mean.detach(), variance.detach(), edges, self.density)
        return torch.where(real[..., None], mass, 0).sum(dim=(1, 2))

    @torch.compiler.assume_constant_result
    def _functions(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres and widths of the basis, (N,) each."""
        empty = torch.empty(0, device=device, dtype=dtype)
        return like(self.basis.centers, empty), like(self.basis.widths, empty)

    @torch.compiler.assume_constant_result
    def _operators(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Of a first fit (N, segment); C (N, N), and of an update the old (N, M) and the new (N, segment) part."""
        key = (device, dtype)
        made = self.__dict__.setdefault("_made", {})
        if key not in made:
            first, later = self.scheme.first(self.segment), self.scheme.later(self.contraction, self.segment)
            M = self.scheme.looks(self.contraction)
            old, new = later.matrix[:, :M], later.matrix[:, M:]
            empty = torch.empty(0, device=device, dtype=dtype)
            arrays = (first.matrix, self.scheme.recurrence(later, self.contraction), old, new)
            made[key] = tuple(like(np.ascontiguousarray(a), empty) for a in arrays)
        return made[key]
