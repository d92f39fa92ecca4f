"""The configuration of a memory inside its flat dict of arrays: JSON, as bytes, under "config"."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..backends.errors import ArgumentError
from ..backends.exchange import to_numpy


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
    return config, {name: to_numpy(array) for name, array in state.items() if name != "config"}


def required(arrays: dict[str, np.ndarray], name: str, shape: tuple[int | None, ...], dtype: Any) -> np.ndarray:
    """A contiguous copy of `arrays[name]`, which must have `shape` (None: any size) and `dtype`.

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
        raise ArgumentError(f"state[{name!r}]", f"{np.dtype(dtype)} {shape}", came, "Pass an unaltered state_dict.")
    return np.array(array, order="C")
