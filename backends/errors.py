"""One family of errors, each of which says what was wrong, what was expected, what came, and what to do."""

from __future__ import annotations

from typing import Any


class PerdureError(Exception):
    """Base of every error perdure raises on purpose.

    Parameters
    ----------
    argument : str
        The argument, setting or file at fault, by the name its user knows it by.
    expected, received : str
        What would have been right, and what came.
    remedy : str
        What to do about it, as an instruction.
    """

    def __init__(self, argument: str, expected: str, received: str, remedy: str):
        Exception.__init__(self, argument, expected, received, remedy)  # not OSError's, which reads meaning into them
        self.argument, self.expected, self.received, self.remedy = argument, expected, received, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.expected, self.received, self.remedy)

    def __str__(self) -> str:
        return f"{self.argument}: expected {self.expected}, got {self.received}. {self.remedy}"


class ArgumentError(PerdureError, ValueError):
    """A value out of its range, or an unknown choice."""


class ShapeError(ArgumentError):
    """An array whose shape does not fit, by itself or beside another."""


class DTypeError(ArgumentError, TypeError):
    """An array of a dtype that cannot be computed with."""


class NonFiniteError(ArgumentError):
    """NaN or infinity, or numbers so large that their products leave the dtype's range."""


class FrameworkError(ArgumentError, TypeError):
    """Something that is no array, or arrays of several frameworks or devices in one call."""


class BackendError(PerdureError, RuntimeError):
    """A backend that is unknown, or that cannot compute on this machine."""


class MissingPackageError(BackendError, ImportError):
    """An optional package that is not installed; the remedy is the exact install line."""


class DeviceMemoryError(BackendError, MemoryError):
    """A device without room for what was asked; nothing has changed."""


class FileError(PerdureError, OSError):
    """A file that cannot be read as what it should be."""


class RecallError(PerdureError, RuntimeError):
    """An approximate index that cannot give as many neighbours as were asked for and are stored."""


class RecallWarning(UserWarning):
    """An approximate index that finds fewer of the nearest than was asked for."""


class StoreError(FileError):
    """A durable store that cannot do what was asked now: held by another writer, out of space, or closed."""


class QuotaError(PerdureError):
    """A write that would exceed a quota; nothing of it has been kept."""


class ForkError(PerdureError, RuntimeError):
    """Something that does not survive a fork, used in the child."""
