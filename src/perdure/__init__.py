"""perdure: long-term memory for any model.

Public names load on first use, so `import perdure` costs next to nothing and imports no framework.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "perdure.backends": ["available_backends", "backend"],
    "perdure.core.attention": ["Reading", "attend", "gate", "merge"],
    "perdure.core.basis": ["Basis", "gaussian_basis", "rectangular_basis"],
    "perdure.core.compression": ["compress"],
    "perdure.core.density": ["mass"],
    "perdure.core.expectation": ["expected_value"],
    "perdure.core.gibbs": ["gibbs_mass", "gibbs_value"],
    "perdure.core.report": ["SignalReport"],
    "perdure.core.retrieval": ["Neighbours", "top_k"],
    "perdure.core.signal": ["Signal", "fit"],
    "perdure.memory.compressive": ["CompressiveMemory"],
    "perdure.memory.continuous": ["ContinuousMemory"],
    "perdure.memory.file": ["load", "save"],
    "perdure.memory.hybrid": ["HybridMemory"],
    "perdure.memory.knn": ["KNNMemory"],
    "perdure.memory.recurrent": ["RecurrentMemory"],
    "perdure.memory.store": ["Store", "open"],
    "perdure.memory.stored": ["StoredMemory"],
    "perdure.memory.window": ["States"],
    "perdure.backends.errors": [
        "ArgumentError",
        "BackendError",
        "DTypeError",
        "DeviceMemoryError",
        "FileError",
        "ForkError",
        "FrameworkError",
        "MissingPackageError",
        "NonFiniteError",
        "PerdureError",
        "RecallError",
        "RecallWarning",
        "QuotaError",
        "ShapeError",
        "StoreError",
    ],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

_MODULES = {"plot": "perdure.bindings.plot"}
_FLOORS = ("backends", "bindings", "core", "memory")

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _FLOORS:
        return importlib.import_module(f"perdure.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'perdure' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, *_FLOORS})
