"""Attention over the local window and over the k nearest of all that came before: Memorizing Transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...backends.errors import ArgumentError
from ...core import checks
from ...core.attention import Reading, gate, masked_softmax, merge
from ...core.relative import biased_attention, buckets, rotate
from ...core.segments import numbers, slide, visible
from ...memory.knn import KNNMemory
from .knn_state import KNNState
from .local import local_attention
from .ops import Ledger, recall
from .segments import SegmentedAttention, even
from .state import State

COMBINE = ("gate", "joint")
POSITIONS = ("none", "t5", "rope")
NOTHING = ("local", "zeros")
KEYS = ("own", "before")
BEGINNINGS = ("apart", "equal")


class MemorizingAttention(SegmentedAttention):
    """Local causal attention, and beside it attention over the k nearest (key, value) pairs of a kNN memory.

    Parameters
    ----------
    dim, heads, head_dim
        Width, heads, and width of a head (dim / heads by default).
    kv_heads : int, optional
        Heads of keys and values, a divisor of `heads` (all by default): as many are stored, and query head h reads that
        of number h // (heads / kv_heads), from memory as from the window.
    capacity : int
        The most tokens the memory holds per row and head.
    k : int
        Neighbours a query retrieves.
    segment : int
        Tokens between two writes; a token sees its own segment, `window` tokens before it, and memory beyond.
    window : int
        Transformer-XL cache: tokens before the segment that local attention still sees.
    overlap : bool
        True (the authors' choice): a segment enters memory as it ends, so the cache is in memory too. False: it enters
        as it leaves the cache.
    normalize : bool
        Queries and keys at norm 1, and a learned scale a head in place of 1/sqrt(head_dim).
    scale : float, optional
        Where the learned scales start; sqrt(head_dim) by default, at which scores spread as those of 1/sqrt(head_dim)
        do without norms. The authors start at 1, which takes long to leave: no score differs from another by more
        than 2 until the scale has grown.
    combine : {"gate", "joint"}
        Two softmaxes mixed by a learned gate a head, or one softmax over neighbours and window together.
    positions : {"none", "t5", "rope"}
        How local attention knows distances; memory carries none.
    nothing : {"local", "zeros"}
        What a query without neighbours gets from memory: its local output unchanged, or, as in the authors' code, k
        slots of zeros. Only of effect with combine="gate".
    keys : {"own", "before"}
        What the key of a token is made of: the token, or the token before it, so that a place is found by what it
        followed and its value is what came next. As in kNN-LM (Khandelwal et al., ICLR 2020) and the smeared keys of
        Olsson et al. ("In-context Learning and Induction Heads", 2022). Of the window's keys too; the key of a
        document's first token is 0, and that of a piece's first token has no gradient.
    projections : {"apart", "equal"}
        How the projections of queries and keys start: drawn apart, or equal, so that like finds like from the first
        step (Reformer, Kitaev et al., ICLR 2020, keeps them so; here they are free to part).
    index, dtype, bias
        Index and dtype of the KNNMemory; whether the projections have biases.

    Raises
    ------
    ArgumentError

    Notes
    -----
    A call of n tokens costs the search of n queries a head in at most `capacity` keys, and O(n (segment + window)) of
    local attention. No gradient reaches what is stored or the selection; gradients reach the queries, the scale and
    the gate through the scores of what was retrieved. Nothing therefore teaches a query to prefer what it has never
    retrieved: in language modelling small models, and short training, gain from memory with keys="before" and
    projections="equal", and next to nothing without; large models learn as much by themselves. Where what was looked
    up has to be compared, as in counting, a layer above must do it (benchmarks/results/learning.md).
    Source: Wu et al., "Memorizing Transformers" (ICLR 2022, arXiv 2203.08913), section 3. Differs from the paper in
    that segments are counted in each row's own tokens, so that padding and the cut into calls change nothing, and in
    where `scale` starts.

    Examples
    --------
    >>> import torch
    >>> from perdure.bindings.torch import MemorizingAttention
    >>> layer = MemorizingAttention(dim=16, heads=2, capacity=1000, k=4, segment=8)
    >>> memory = None
    >>> for x in torch.randn(3, 1, 8, 16):
    ...     output, memory = layer(x, memory)
    >>> memory.tokens  # the third segment enters as the fourth call begins
    array([16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        capacity: int,
        k: int = 32,
        segment: int = 512,
        window: int = 0,
        overlap: bool = True,
        normalize: bool = True,
        scale: float | None = None,
        combine: str = "gate",
        positions: str = "none",
        nothing: str = "local",
        keys: str = "own",
        projections: str = "apart",
        head_dim: int | None = None,
        kv_heads: int | None = None,
        index: str = "exact",
        dtype: str = "float32",
        bias: bool = False,
    ):
        super().__init__(dim, heads, head_dim, segment, window)
        self.capacity, self.k = checks.count("capacity", capacity), checks.count("k", k)
        self.combine, self.positions = checks.choice("combine", combine, COMBINE), positions
        checks.choice("positions", positions, POSITIONS)
        if combine == "joint" and overlap and self.reach:
            twice = "overlap=True: the cache is in memory too, and would count twice in one softmax"
            raise ArgumentError("overlap", "False with combine='joint' and a window", twice, "Pass overlap=False.")
        if positions == "rope":
            even("head_dim", self.head_dim)
        self.nothing, self.index, self.dtype = checks.choice("nothing", nothing, NOTHING), index, dtype
        self.overlap, self.normalize = checks.flag("overlap", overlap), checks.flag("normalize", normalize)
        self.keys = checks.choice("keys", keys, KEYS)
        checks.choice("projections", projections, BEGINNINGS)
        self.kv_heads = self.heads if kv_heads is None else checks.count("kv_heads", kv_heads)
        if self.heads % self.kv_heads:
            raise ArgumentError("kv_heads", f"a divisor of heads={heads}", str(kv_heads), "Every group has one size.")
        inner = self.heads * self.head_dim
        self.query = nn.Linear(dim, inner, bias=bias)
        self.key, self.value = (nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias) for _ in range(2))
        self.output = nn.Linear(inner, dim, bias=bias)
        if projections == "equal":  # a key head with the first query head of its group
            with torch.no_grad():
                for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                    grouped = query.unflatten(0, (self.kv_heads, -1, self.head_dim))
                    key.copy_(grouped[:, 0].flatten(0, 1))
        begin = self.head_dim**0.5 if scale is None else checks.positive("scale", scale)
        self.scale = nn.Parameter(torch.full((self.heads,), begin)) if normalize else None
        self.gate = nn.Parameter(torch.zeros(self.heads)) if combine == "gate" else None
        self.bias = nn.Embedding(32, self.heads) if positions == "t5" else None
        KNNMemory(1, self.kv_heads, self.head_dim, self.capacity, index=index, dtype=dtype)  # refuses what it cannot do
        self.settings |= {"overlap": overlap, "normalize": normalize, "capacity": self.capacity}
        self.settings |= {"index": index, "dtype": dtype}

    def memory(self, rows: int) -> KNNState:
        """A fresh memory for `rows` documents."""
        rows = checks.count("rows", rows)
        knn = KNNMemory(rows, self.kv_heads, self.head_dim, self.capacity, index=self.index, dtype=self.dtype)
        ledger = Ledger.of(knn, self.settings)
        like = self.query.weight
        empty = like.new_zeros((rows, *self._shapes()["keys"]))
        position = torch.zeros(rows, dtype=torch.int64, device=like.device)
        ahead = like.new_zeros((rows, *self._shapes()["ahead"]))
        return KNNState(position, 0, False, self.settings, empty, empty.clone(), ahead, ledger.token(), ledger)

    def _kind(self) -> type[State]:
        return KNNState

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        window = (self.kv_heads, self.segment + self.reach, self.head_dim)
        ahead = (self.kv_heads, int(self.keys == "before"), self.head_dim)
        return {"position": (), "keys": window, "values": window, "ahead": ahead}

    def _attend(
        self, x: torch.Tensor, memory: Any, start: Any, present: Any, turning: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        queries, keys, values = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        ahead = memory.ahead
        if self.keys == "before":
            keys, ahead = delayed(ahead, keys, present)
        if self.normalize:
            queries, keys = unit(queries), unit(keys)
            scaled = queries * self.scale.abs()[:, None, None].to(queries.dtype)
        else:
            scaled = queries / math.sqrt(self.head_dim)
        begins = torch.zeros_like(memory.position, dtype=torch.bool) if start is None else start
        k = self._slots(memory.position)
        recalled = recall(memory.token, queries.detach(), memory.keys, memory.values, memory.position, begins, k)
        token, retrieved = recalled[0], recalled[1:]
        with torch.autocast(x.device.type, enabled=False):  # scores and softmax in full precision
            read = self._read(scaled, *retrieved)
            output = self._mixed(read, scaled, keys, values, memory, present)
        kept = {
            "token": token,
            "ahead": ahead,
            "keys": slide(memory.keys, keys.detach(), present),
            "values": slide(memory.values, values.detach(), present),
        }
        return self.output(self._joined(output)), kept

    def _slots(self, position: torch.Tensor) -> int:
        """How many neighbours to ask for: no more than there can be, where that may be looked up."""
        if self.nothing == "zeros" or torch.compiler.is_compiling():
            return self.k
        return min(self.k, self.capacity, max(int(position.max()), 1))

    def _read(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, found: torch.Tensor) -> Reading:
        """Attention of (already scaled) queries over what each retrieved."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        keys, values = keys.to(wide), values.to(wide)  # zeros where nothing was found, so nothing need be blanked
        scores = (queries.to(wide)[..., None, :] @ keys.mT)[..., 0, :]  # (rows, heads, n, k)
        weights, lse = masked_softmax(scores, torch.ones_like(found) if self.nothing == "zeros" else found)
        return Reading((weights[..., None, :] @ values)[..., 0, :].to(queries.dtype), lse)

    def _mixed(
        self,
        read: Reading,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        memory: KNNState,
        present: Any,
    ) -> torch.Tensor:
        """Local attention and the reading of memory as one output (rows, heads, n, head_dim)."""
        n, seen = queries.shape[2], self._seen(memory)
        keys = torch.cat([memory.keys[:, :, memory.keys.shape[2] - seen :].to(keys.dtype), keys], dim=2)
        values = torch.cat([memory.values[:, :, memory.values.shape[2] - seen :].to(values.dtype), values], dim=2)
        tokens = numbers(memory.position, seen, n, present)
        allowed, bias = visible(tokens, n, self.segment, self.reach), None
        if self.positions == "rope":
            near = tokens - (memory.position // self.segment * self.segment)[:, None]  # of however long a document
            queries, keys = rotate(queries, near[:, None, seen:]), rotate(keys, near[:, None])
        elif self.positions == "t5":
            alike = tokens if present is not None else tokens[:1]  # without padding, distances are those of every row
            distances = alike[:, seen:, None] - alike[:, None, :]
            bias = self.bias(buckets(distances)).movedim(-1, 1)
        if self.kv_heads != self.heads:
            keys, values = (a.repeat_interleave(self.heads // self.kv_heads, dim=1) for a in (keys, values))
        if self.combine == "joint":
            return merge(read, biased_attention(queries, keys, values, bias, 1.0, allowed[:, None])).output
        local = local_attention(queries, keys, values, allowed, 1.0, bias)
        return gate(read.output if self.nothing == "zeros" else read, local, self.gate)


def delayed(ahead: torch.Tensor, new: torch.Tensor, present: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `new` (rows, heads, n, d) every column's token before it, `ahead` (rows, heads, 1, d) before the first.

    And second, what is ahead of the next call.
    """
    both = torch.cat([ahead.to(new.dtype), new], dim=2)
    if present is None:
        return both[:, :, :-1], both[:, :, -1:].detach().to(ahead.dtype)
    columns = torch.arange(1, both.shape[2], device=new.device)
    last = torch.where(present, columns, 0).cummax(dim=1).values  # up to each column, the newest token's
    last = nn.functional.pad(last, (1, 0))[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    both = both.gather(2, last)
    return both[:, :, :-1], both[:, :, -1:].detach().to(ahead.dtype)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """x / sqrt(|x|² + 1e-6), the authors' normalisation, whose gradient is finite at 0; in at least float32."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))  # squares of float16 overflow from 256 on
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + 1e-6)).to(vectors.dtype)
