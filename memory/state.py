"""The configuration of a memory inside its flat dict of arrays: JSON, as bytes, under "config"."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import numpy as np

from ..backends.errors import ArgumentError
from ..backends.exchange import to_numpy
from ..core import checks

Kept = TypeVar("Kept")
UNALTERED = "Pass an unaltered state_dict."


def pack(kind: str, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`arrays` with `config` and the memory's kind beside them, fit for safetensors and torch.save."""
    text = json.dumps({"kind": kind, **config}, sort_keys=True)
    return {"config": np.frombuffer(text.encode(), np.uint8).copy(), **arrays}


def unpack(kind: str, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and arrays of a state made by `pack`, in NumPy whatever framework it travelled through.

    Raises
    ------
    ArgumentError
        No state of a memory of this kind.
    """
    try:
        config = json.loads(to_numpy(state["config"]).astype(np.uint8, casting="equiv").tobytes())
        found = config.pop("kind")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(
            "state", f"the state_dict of a {kind}", f"no readable configuration ({error})", "Pass what state_dict gave."
        ) from error
    if found != kind:
        raise ArgumentError("state", f"the state_dict of a {kind}", f"that of a {found}", f"Use {found}.")
    return config, {name: as_numpy(array) for name, array in state.items() if name != "config"}


class Owned(np.ndarray):
    """An array nobody else holds: a memory may keep it and write to it instead of copying it."""


class Mapped(Owned):
    """One that is still on the disk, and may be larger than the machine's memory: not to be read as a whole."""


def as_numpy(array: Any) -> np.ndarray:
    """`array` as NumPy, float16 kept."""
    if isinstance(array, np.ndarray):
        return array
    half = str(getattr(array, "dtype", "")).rpartition(".")[2] == "float16"  # to_numpy computes in float32
    return to_numpy(array).astype(np.float16) if half else to_numpy(array)


def rebuilt(kind: type[Kept], config: dict[str, Any], **more: Any) -> Kept:
    """A memory made of the arguments that a state holds.

    Raises
    ------
    ArgumentError
        They are none that such a memory takes.
    """
    try:
        return kind(**config, **more)
    except (TypeError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError("state['config']", f"a {kind.__name__}'s", str(error), UNALTERED) from error


def counts(arrays: dict[str, np.ndarray], name: str, rows: int, most: int | None = None) -> np.ndarray:
    """`arrays[name]`, int64 (rows,), none below 0 or above `most`.

    Raises
    ------
    ArgumentError
    """
    array = required(arrays, name, (rows,), np.int64)
    if (array < 0).any() or (most is not None and (array > most).any()):
        expected = "counts" if most is None else f"counts up to {most}"
        raise ArgumentError(f"state[{name!r}]", expected, str(array), UNALTERED)
    return array


def required(arrays: dict[str, np.ndarray], name: str, shape: tuple[int | None, ...], dtype: Any) -> np.ndarray:
    """`arrays[name]`, contiguous, which must have `shape` (None: any size) and `dtype`.

    A copy, unless it is `Owned`.

    Raises
    ------
    ArgumentError
    """
    array = arrays.get(name)
    if array is not None and array.dtype == np.float32 and dtype == np.float16:  # half precision travels widened
        array = array.astype(np.float16)
    fits = (
        array is not None
        and array.dtype == dtype
        and array.ndim == len(shape)
        and all(e is None or e == a for e, a in zip(shape, array.shape, strict=True))
    )
    if not fits:
        came = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise ArgumentError(f"state[{name!r}]", f"{np.dtype(dtype)} {shape}", came, UNALTERED)
    return array.view(np.ndarray) if isinstance(array, Owned) else np.array(array, order="C")


def required_finite(arrays: dict[str, np.ndarray], name: str, shape: tuple[int | None, ...], dtype: Any) -> np.ndarray:
    """`arrays[name]` as `required` gives it, all of it finite; what is `Mapped` is taken at its word.

    Raises
    ------
    ArgumentError, NonFiniteError
    """
    array = required(arrays, name, shape, dtype)
    if np.issubdtype(array.dtype, np.floating) and not isinstance(arrays[name], Mapped):
        checks.finite(**{f"state[{name!r}]": array})
    return array
