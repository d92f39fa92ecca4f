"""The kinds of memory by name, and which class revives a saved one: from this table, never from what a file says."""

from __future__ import annotations

import importlib
import inspect
import json
from typing import Any

import numpy as np

from ..backends.errors import ArgumentError, PerdureError
from .protocol import Memory

KINDS = {
    "knn": ("knn", "KNNMemory"),
    "continuous": ("continuous", "ContinuousMemory"),
    "recurrent": ("recurrent", "RecurrentMemory"),
    "compressive": ("compressive", "CompressiveMemory"),
    "hybrid": ("hybrid", "HybridMemory"),
}
REPEATED = ("knn", "continuous", "recurrent")  # their state follows from calls of write and clear alone

MOVABLE = ("knn", "continuous")  # they live on a device where asked to


def class_of(kind: str) -> type[Memory]:
    """The class called `kind`, "knn" for instance.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ArgumentError("kind", f"one of {', '.join(KINDS)}", repr(kind)[:200], "Name a kind of memory.")
    module, name = KINDS[kind]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def make(kind: str, config: dict[str, Any]) -> Memory:
    """A new memory of that kind; `config` holds its class's arguments.

    Raises
    ------
    ArgumentError
        An unknown kind, or an argument that is unknown, missing, or not what the class takes.
    """
    cls = class_of(kind)
    known = dict(inspect.signature(cls).parameters)
    passed_on = [name for name, parameter in known.items() if parameter.kind is parameter.VAR_KEYWORD]
    for name in passed_on:
        del known[name]
    for name in config:
        if name not in known and not passed_on:
            raise ArgumentError(name, f"one of {', '.join(known)}", "a setting nobody knows", "Leave it out.")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in config:
            raise ArgumentError(name, f"a value, as every {kind} memory needs", "nothing", f"Pass {name}=.")
    try:
        return cls(**config)
    except PerdureError:
        raise
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        remedy = f"See {cls.__name__}."
        raise ArgumentError("settings", f"those of a {kind} memory", str(error)[:200] or "others", remedy) from error


def kind_of(memory: Memory) -> str:
    """What `memory` is called in KINDS.

    Raises
    ------
    ArgumentError
    """
    for kind, (_, name) in KINDS.items():
        if type(memory).__name__ == name and type(memory) is class_of(kind):
            return kind
    known = ", ".join(name for _, name in KINDS.values())
    raise ArgumentError("memory", f"one of {known}", type(memory).__name__, "Save its state_dict yourself.")


def config_of(state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and configuration that a state_dict carries.

    Raises
    ------
    ArgumentError
        No readable configuration, or an unknown kind.
    """
    try:
        config = json.loads(bytes(np.asarray(state["config"], np.uint8)))
        name = config.pop("kind")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArgumentError("state", "a memory's state_dict", f"no readable configuration ({error})", REMEDY) from error
    for kind, (_, known) in KINDS.items():
        if name == known:
            return kind, config
    raise ArgumentError("state", f"one of {', '.join(KINDS)}", f"a memory called {name!r}"[:200], REMEDY)


def revive(state: dict[str, Any]) -> Memory:
    """The memory whose state_dict `state` is.

    Raises
    ------
    ArgumentError
        Not a state of a known kind, or one that does not fit together.
    """
    kind, config = config_of(state)
    claimed, held = config.get("rows", 0), sum(array.nbytes for array in state.values())
    if not isinstance(claimed, int) or claimed > held:  # every row has at least a counter of 8 bytes
        raise ArgumentError("state", f"at most {held} rows", repr(claimed)[:80], REMEDY)
    try:
        return class_of(kind).from_state_dict(state)
    except ArgumentError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise ArgumentError("state", f"the state of a {kind} memory", str(error)[:200], REMEDY) from error


REMEDY = "Pass an unaltered state_dict."
