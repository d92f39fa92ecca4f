"""Who computes: the registry of backends, and what each accelerates."""

from .registry import KERNELS, available_backends, backend, current_backend, kernel, register

__all__ = ["KERNELS", "available_backends", "backend", "current_backend", "kernel", "register"]
