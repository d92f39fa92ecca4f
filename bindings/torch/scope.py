"""Memory held for a model whose own code passes none along."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from ...backends.errors import ArgumentError
from .segments import SegmentedAttention
from .transformer import MemoryTransformer

NAMES = ("memory", "start", "mask")  # what may follow the input of a layer, in this order


class MemoryScope:
    """Inside a `with` block, every layer with memory in `model` goes on from where its last call left it.

    A layer that is called without a memory gets the one held for it, a fresh one at first; a call that is given a
    memory is left alone. What a call of the model returns is held once that call has come to its end: an exception on
    the way leaves what is held as it was, so that the call can be made again; a layer with a kNN memory, which by then
    has taken what the segments before had completed, wants it with the same `start` and of at most one segment. On
    leaving the block, however it is left, the model is as before.

    Parameters
    ----------
    model : nn.Module
        With at least one layer of `perdure.bindings.torch`, or a MemoryTransformer, somewhere in it.

    Attributes
    ----------
    states : dict
        What is held, by the name of the layer in `model`: a State, or for a MemoryTransformer a tuple of them. Kept
        when the block is left; entered again, the scope goes on from it.

    Raises
    ------
    ArgumentError
        A model without such a layer.

    Notes
    -----
    A layer that is called twice within one call of the model reads the second time what the first one left. Blocks that
    are checkpointed run again in the backward pass, when what is held has moved on: that is refused, except inside a
    MemoryTransformer, which passes its memory along.

    Examples
    --------
    >>> import torch
    >>> from perdure.bindings.torch import MemorizingAttention, MemoryScope
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.attention = MemorizingAttention(16, heads=2, capacity=100, k=4, segment=8)
    ...     def forward(self, x):
    ...         return x + self.attention(x)[0]
    >>> model = Model()
    >>> with MemoryScope(model) as scope:
    ...     for x in torch.randn(3, 1, 8, 16):
    ...         y = model(x)
    >>> scope.states["attention"].position
    tensor([24])
    """

    def __init__(self, model: nn.Module):
        self.model, self.states = model, dict[str, Any]()
        self._staged: dict[str, Any] = {}
        self._given: dict[str, Any] = {}
        self._masks: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._inside = False
        self._layers = carriers(model)
        if not self._layers:
            raise ArgumentError("model", "a layer with memory in it", type(model).__name__, "Build it with one.")

    def announce(self, start: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> None:
        """In the next call of the model, rows in `start` (rows,) begin a document, and `mask` (rows, n) is no padding.

        Handed to every layer in that call, and forgotten once it has come to its end.
        """
        given = {"start": start, "mask": mask}
        self._masks = {name: tensor for name, tensor in given.items() if tensor is not None}

    def clear(self) -> None:
        """Hold nothing: the next call begins with fresh memories."""
        self.states = {}

    def __enter__(self) -> Self:
        if self._handles:
            raise ArgumentError("scope", "a scope that is not entered", "one that is", "Make another MemoryScope.")
        for name, layer in self._layers.items():  # before the hooks of an outer scope: the inner one holds the memory
            self._handles += [
                layer.register_forward_pre_hook(self._hand(name), with_kwargs=True, prepend=True),
                layer.register_forward_hook(self._take(name), with_kwargs=True),
            ]
        self._handles += [
            self.model.register_forward_pre_hook(self._begin, prepend=True),
            self.model.register_forward_hook(self._commit),
            self.model.register_forward_hook(self._end, always_call=True),  # after an exception too
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._masks = [], {}

    def _begin(self, *call: Any) -> None:
        self._inside = True

    def _commit(self, *call: Any) -> None:
        self.states, self._staged, self._masks = {**self.states, **self._staged}, {}, {}

    def _end(self, *call: Any) -> None:
        self._staged, self._given, self._inside = {}, {}, False

    def _hand(self, name: str) -> Any:
        """A hook that gives the layer what is held for it, where the caller gives nothing."""

        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            arguments = {**dict(zip(NAMES, args[1:], strict=False)), **kwargs}
            x = args[0] if args else kwargs.get("x", kwargs.get("tokens"))
            self._given.pop(name, None)
            if arguments.get("memory") is not None or not isinstance(x, torch.Tensor):
                return None
            if torch._C._current_graph_task_id() != -1:  # inside a backward pass
                raise ArgumentError(
                    "memory",
                    "a memory passed to a layer whose block is checkpointed",
                    "a MemoryScope",
                    "Pass memory in and out, or do not recompute this layer.",
                )
            memory = self._staged.get(name, self.states.get(name))
            arguments["memory"] = self._given[name] = layer.memory(x.shape[0]) if memory is None else memory
            for mask, tensor in self._masks.items():
                if arguments.get(mask) is None and (mask == "mask" or name not in self._staged):  # starts but once
                    arguments[mask] = tensor
            return args[:1], arguments

        return hook

    def _take(self, name: str) -> Any:
        """A hook that keeps what the layer returns, if it was given what is held."""

        def hook(layer: Any, args: Any, kwargs: dict[str, Any], output: tuple[Any, Any]) -> None:
            if name in self._given and kwargs.get("memory") is self._given.pop(name):
                self._staged[name] = output[1]
                if not self._inside:  # called by itself, not within a call of the model
                    self._commit()

        return hook


def carriers(model: nn.Module) -> dict[str, SegmentedAttention | MemoryTransformer]:
    """The outermost modules in `model` that take a memory and return the next, by name."""
    found: dict[str, SegmentedAttention | MemoryTransformer] = {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, SegmentedAttention | MemoryTransformer) and not inside:
            found[name] = module
    return found
