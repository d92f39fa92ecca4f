"""Who computes: the registry of backends, and what each accelerates."""

from . import limits as limits  # early, so that what threadpoolctl limits from now on is known
from .registry import KERNELS, available_backends, backend, current_backend, kernel, register

__all__ = ["KERNELS", "available_backends", "backend", "current_backend", "kernel", "register"]
