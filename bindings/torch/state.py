"""What every layer's memory carries from call to call: plain tensors, passed in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch

from ...backends.errors import ArgumentError, DTypeError, FrameworkError, ShapeError
from ...core import checks


@dataclass(frozen=True, eq=False)
class State:
    """The memory of one layer, for a batch of rows. A call takes a state and returns the next.

    Attributes
    ----------
    position : int64 tensor (rows,)
        Tokens each row has read since its document began.
    phase : int
        Tokens since the last boundary between segments: of every row, or of the furthest where rows are `ragged`.
    ragged : bool
        Whether rows may stand at different distances from a boundary.
    settings : dict
        Those of the layer it is of, as far as a memory depends on them.
    """

    position: torch.Tensor
    phase: int
    ragged: bool
    settings: dict[str, Any]

    @property
    def rows(self) -> int:
        """Documents, users or batch elements."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name; the first axis of each is the rows."""
        names = (f.name for f in fields(self) if f.name not in self._made())
        return {name: value for name in names if isinstance(value := getattr(self, name), torch.Tensor)}

    def following(self, **changed: Any) -> Self:
        """This state with the fields in `changed`, and without the loss of the call that returned it."""
        names = (f.name for f in fields(self) if f.name not in changed and f.name != "loss")
        return type(self)(**{name: getattr(self, name) for name in names}, **changed)

    def select(self, rows: Sequence[int]) -> Self:
        """A state of its own with `rows` of this one, in that order; a row may come more than once (beam search).

        Raises
        ------
        ArgumentError
            A row out of range, or none at all.
        """
        index = self._index(rows)
        made = self._remade(index)
        parts = {name: tensor[index] for name, tensor in self.tensors().items()}
        return type(self)(**self._progress(), **parts, **made)

    def to(self, device: torch.device | str) -> Self:
        """A state of its own with the tensors on `device`; a kNN memory follows its layer's at the next write."""
        made = self.select(range(self.rows))
        return made.following(**{name: tensor.to(device) for name, tensor in made.tensors().items()})

    def _remade(self, rows: list[int]) -> dict[str, Any]:
        """What a state of `rows` has in the fields that are `_made`."""
        return {}

    def _progress(self) -> dict[str, Any]:
        """The fields that are no tensors."""
        return {"phase": self.phase, "ragged": self.ragged, "settings": self.settings}

    def restarted(self, start: torch.Tensor) -> Self:
        """This state with zeros in the tensors of rows that `start`: nothing of their old documents is carried on."""
        parts = {
            name: torch.where(start.view(-1, *(1,) * (tensor.ndim - 1)), 0, tensor)
            for name, tensor in self.tensors().items()
        }
        return self.following(**parts)

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """A state of its own with the rows of all `states`, in their order: the opposite of `select`.

        Raises
        ------
        ArgumentError
            None at all, or states of several kinds, shapes or configurations.
        """
        states = list(states)
        kinds = ", ".join(sorted({type(state).__name__ for state in states})) or "none"
        if kinds != cls.__name__:
            raise ArgumentError("states", f"at least one {cls.__name__}, and no other", kinds, "Join those of a layer.")
        for state in states[1:]:
            alike("states", states[0].settings, state.settings)
        parts = {}
        for name, tensor in states[0].tensors().items():
            tensors = [state.tensors()[name] for state in states]
            shapes = sorted({(*tensor.shape[1:], str(tensor.dtype)) for tensor in tensors})
            if len(shapes) > 1:
                raise ArgumentError(f"states.{name}", "one shape and dtype", str(shapes), "Join those of one layer.")
            parts[name] = torch.cat(tensors)
        phases = {state.phase for state in states}
        ragged = len(phases) > 1 or any(state.ragged for state in states)
        return cls(phase=max(phases), ragged=ragged, settings=states[0].settings, **cls._joined(states, parts))

    @classmethod
    def _joined(cls, states: list[Self], parts: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The fields of the joined state other than the progress, given its tensors."""
        return parts

    def _index(self, rows: Sequence[int]) -> list[int]:
        index = [checks.count("rows", row, least=0) for row in rows]
        if not index or max(index) >= self.rows:
            raise ArgumentError("rows", f"rows below {self.rows}", str(index), "Name rows that this state has.")
        return index

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.select(range(self.rows))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_state_dict, (self.state_dict(),)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of everything, as a flat dict of tensors; "config" holds JSON as uint8."""
        config = {"kind": type(self).__name__, **self._progress()}
        text = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
        return {"config": text, **{name: tensor.detach().clone() for name, tensor in self.tensors().items()}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The state that `state_dict` described as `state`; a layer continues from it bit by bit as it would have.

        Raises
        ------
        ArgumentError
            The state of another kind of memory, or an incomplete one.
        """
        return cls(**cls._parts(state))

    @classmethod
    def _parts(cls, state: dict[str, Any]) -> dict[str, Any]:
        try:
            config = state["config"]
            config = json.loads(
                bytes(np.asarray(config.cpu() if isinstance(config, torch.Tensor) else config, np.uint8))
            )
            kind = config.pop("kind")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(
                "state", f"the state_dict of a {cls.__name__}", f"no readable configuration ({error})", "Pass it whole."
            ) from error
        if kind != cls.__name__:
            raise ArgumentError("state", f"the state_dict of a {cls.__name__}", f"that of a {kind}", f"Use {kind}.")
        parts = {f.name: state[f.name].clone() for f in fields(cls) if isinstance(state.get(f.name), torch.Tensor)}
        missing = sorted({f.name for f in fields(cls)} - set(parts) - set(config) - cls._made())
        if missing:
            raise ArgumentError("state", f"an entry {missing[0]!r}", "none", "Pass an unaltered state_dict.")
        return {**parts, **config}

    @classmethod
    def _made(cls) -> set[str]:
        """Fields that are no tensors to keep: what a state selected, copied or loaded makes anew."""
        return set()

    def fits(self, x: torch.Tensor, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        """This state serves input `x` (rows, n, dim) of a layer whose states have `settings` and `shapes`, rows aside.

        Raises
        ------
        ShapeError, DTypeError, FrameworkError, ArgumentError
        """
        if self.rows != x.shape[0]:
            raise ShapeError(
                "memory", f"{x.shape[0]} rows, as x has", f"{self.rows}", "Use memory.select(rows), or a fresh memory."
            )
        for name, tensor in self.tensors().items():
            shape = shapes.get(name, ())
            if tuple(tensor.shape[1:]) != shape:
                raise ShapeError(
                    f"memory.{name}",
                    f"shape {('rows', *shape)}",
                    str(tuple(tensor.shape)),
                    "Pass the memory of a layer with the same configuration.",
                )
            if tensor.device != x.device:
                raise FrameworkError(
                    f"memory.{name}",
                    f"a tensor on {x.device}, as x is",
                    f"one on {tensor.device}",
                    "Use memory.to(device).",
                )
            if tensor.dtype != torch.int64 if name == "position" else not tensor.is_floating_point():
                wanted = "int64" if name == "position" else "floating-point numbers"
                raise DTypeError(f"memory.{name}", wanted, str(tensor.dtype), "Pass an unaltered state.")
        alike("memory", settings, self.settings)


def alike(argument: str, expected: dict[str, Any], received: dict[str, Any]) -> None:
    """Both are the settings of one layer.

    Raises
    ------
    ArgumentError
    """
    if expected != received:
        names = [name for name in {**expected, **received} if expected.get(name) != received.get(name)]
        wanted, came = (", ".join(f"{name}={each.get(name)!r}" for name in names) for each in (expected, received))
        raise ArgumentError(argument, wanted, came, "Pass the memory of a layer with the same configuration.")
