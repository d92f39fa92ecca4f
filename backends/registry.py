"""One registry of backends, one rule of choice, one way for a formula to be accelerated.

A formula in core/ marked `@kernel` runs as it stands on any array-API framework. A backend is a module; a function in
it that bears the kernel's name and signature replaces the formula there, and may return NotImplemented for the inputs
it has nothing faster for. Who computes is decided in this order:

1. the arrays' own framework, when they are not NumPy's;
2. `with perdure.backend("name")`;
3. the environment variable PERDURE_BACKEND;
4. the default, numba.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import numpy as np

from .arrays import STANDARD, cast, common_framework, computing_dtype, framework, is_floating, narrow
from .errors import ArgumentError, BackendError

DEFAULT = "numba"
VARIABLE = "PERDURE_BACKEND"

_modules: dict[str, str | ModuleType] = {name: f"{__package__}.{name}" for name in ("numpy", "numba", "torch", "cupy")}
_loaded: dict[str, ModuleType] = {}  # a plain dict, so that torch.compile can trace the choice of a backend
_chosen: ContextVar[str | None] = ContextVar("perdure_backend", default=None)

KERNELS: dict[str, Kernel] = {}


class Kernel:
    """A formula that backends may accelerate by name; calling it picks who computes.

    Half-precision arrays are widened to float32 before any backend sees them, and floating results narrowed back,
    so formulas and twins meet float32 and float64 only. `formula` is the plain function, the oracle of all its twins.
    """

    def __init__(self, formula: Callable[..., Any], wide: tuple[int, ...]):
        functools.update_wrapper(self, formula)
        self.formula, self.name, self.wide = formula, formula.__name__, wide

    def __call__(self, *args: Any) -> Any:
        arrays = {str(i): a for i, a in enumerate(args) if framework(a) is not None}
        home = common_framework(**arrays)
        floats = [a for a in arrays.values() if is_floating(a)]
        given, computing = floats[0].dtype, computing_dtype(*floats)
        if any(a.dtype != computing for a in floats):
            args = tuple(cast(a, computing) if framework(a) is not None and is_floating(a) else a for a in args)
        result = self._compute(home, args)
        if not isinstance(result, tuple):
            return self._narrow(result, given)
        return tuple(r if i in self.wide else self._narrow(r, given) for i, r in enumerate(result))

    def _compute(self, home: str, args: tuple[Any, ...]) -> Any:
        if home == STANDARD:
            return self.formula(*args)
        name = current_backend() if home == "numpy" else home
        module = load(name)
        travels = home == "numpy" and hasattr(module, "from_numpy")
        if travels:
            args = tuple(module.from_numpy(a) if framework(a) == "numpy" else a for a in args)
        twin = getattr(module, self.name, None)
        result = NotImplemented if twin is None else twin(*args)
        if result is NotImplemented:
            result = self._silently(*args) if home == "numpy" else self.formula(*args)
        if travels:
            result = tuple(map(module.to_numpy, result)) if isinstance(result, tuple) else module.to_numpy(result)
        return result

    @np.errstate(over="ignore", invalid="ignore")
    def _silently(self, *args: Any) -> Any:
        """The formula on NumPy's arrays; what overflows is the caller's to tell, not NumPy's to warn of."""
        return self.formula(*args)

    @staticmethod
    def _narrow(result: Any, dtype: Any) -> Any:
        return narrow(result, dtype) if is_floating(result) and result.dtype != dtype else result

    def __repr__(self) -> str:
        return f"<kernel {self.name}>"


def kernel(formula: Callable[..., Any] | None = None, *, wide: tuple[int, ...] = ()) -> Any:
    """Mark a formula of core/ as a kernel.

    Parameters
    ----------
    formula : callable
        Takes its arguments by position and returns an array or a tuple of arrays.
    wide : tuple of int
        Which results stay in the computing dtype (at least float32) although the inputs were narrower.
    """
    if formula is None:
        return functools.partial(kernel, wide=wide)
    made = Kernel(formula, wide)
    KERNELS[made.name] = made
    return made


def register(name: str, module: ModuleType | str) -> None:
    """Add a backend: a module (or its import path) with any subset of the kernels' names.

    It may also define `probe()`, which raises BackendError where it cannot compute, and `from_numpy`/`to_numpy`,
    when it computes on arrays of its own.
    """
    _modules[name] = module
    _loaded.pop(name, None)


def load(name: str) -> ModuleType:
    """The backend module called `name`, probed once.

    Raises
    ------
    BackendError
        Unknown, or unusable on this machine; MissingPackageError where a package is missing.
    """
    if name in _loaded:
        return _loaded[name]
    if name not in _modules:
        raise BackendError(
            "backend",
            f"one of {', '.join(_modules)}",
            repr(name),
            f"Choose one of these in {VARIABLE} or perdure.backend(...).",
        )
    module = _modules[name]
    if isinstance(module, str):
        try:
            module = importlib.import_module(module)
        except ImportError as error:
            raise BackendError(
                name, "a module that can be imported", str(error), f"Repair {module}, or choose another backend."
            ) from error
    getattr(module, "probe", lambda: None)()
    _loaded[name] = module
    return module


def current_backend() -> str:
    """Name of the backend that computes NumPy inputs here and now."""
    return _chosen.get() or os.environ.get(VARIABLE) or DEFAULT


@contextmanager
def backend(name: str) -> Iterator[ModuleType]:
    """Let `name` compute NumPy inputs inside the `with` block (this thread and task only); NumPy comes back.

    Raises
    ------
    BackendError
        `name` is unknown or unusable on this machine.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> with perdure.backend("numpy"):
    ...     near = perdure.top_k(np.eye(3), np.eye(3), k=1)
    >>> near.positions.ravel().tolist()
    [0, 1, 2]
    """
    if not isinstance(name, str):
        raise ArgumentError("backend", "a name", repr(name), f"Known: {', '.join(_modules)}.")
    module = load(name)
    token = _chosen.set(name)
    try:
        yield module
    finally:
        _chosen.reset(token)


class Backends(tuple[str, ...]):
    """Names of the backends usable on this machine; `unusable` maps each other name to the reason."""

    unusable: dict[str, str]

    def __new__(cls, usable: tuple[str, ...], unusable: dict[str, str]) -> Backends:
        made = super().__new__(cls, usable)
        made.unusable = unusable
        return made

    def __repr__(self) -> str:
        lines = [f"{name}: usable" for name in self]
        return "\n".join(lines + [f"{name}: not usable: {reason}" for name, reason in self.unusable.items()])


def available_backends() -> Backends:
    """Names of the backends that can compute on this machine, tried for real, with the reason for each that cannot.

    Returns
    -------
    Backends
        A tuple of names; its `unusable` maps every other known name to the reason. Imports every framework it finds.
    """
    usable, unusable = [], {}
    for name in _modules:
        try:
            load(name)
            usable.append(name)
        except BackendError as error:
            unusable[name] = str(error)
    return Backends(tuple(usable), unusable)
