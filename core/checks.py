"""What public functions ask of their arguments, once, before anything is computed."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from ..backends.arrays import (
    cast,
    common_framework,
    computing_dtype,
    framework,
    inspectable,
    is_floating,
    known_framework,
    namespace,
)
from ..backends.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from ..backends.exchange import to_numpy
from ..backends.registry import current_backend, load

ADDRESSES = 1 << 47  # bytes of a process's address space
MANY = 65_536  # neighbours that may be asked for however few keys there are


def floating_arrays(**arrays: Any) -> None:
    """All arrays belong to one framework and device and hold floats; None is skipped.

    Raises
    ------
    FrameworkError, DTypeError
    BackendError
        The backend chosen for NumPy's arrays is unknown or unusable.
    """
    if common_framework(**arrays) == "numpy":
        load(current_backend())  # refused here too, where no kernel would ask who computes
    for argument, array in arrays.items():
        if array is not None and not is_floating(array):
            raise DTypeError(
                argument, "a floating-point dtype", str(array.dtype), "Cast it, for example to float32, first."
            )


def shape(argument: str, array: Any, *expected: int | str, whole: bool = False) -> None:
    """The last axes of `array` are `expected`: an int must match, a name stands for any size.

    Any axes may lead, unless `expected` is the `whole` shape.

    Raises
    ------
    ShapeError
    FrameworkError
        `array` is no array: what may be left out is checked only where it is given.
    """
    known_framework(argument, array)
    actual = tuple(array.shape)
    tail = actual[max(len(actual) - len(expected), 0) :]
    fits = len(actual) == len(expected) if whole else len(actual) >= len(expected)
    if not fits or any(isinstance(e, int) and e != a for e, a in zip(expected, tail, strict=True)):
        wanted = ", ".join(str(e) for e in (expected if whole else ("...", *expected)))
        raise ShapeError(argument, f"shape ({wanted})", str(actual), "Reshape it, or check which array was meant.")


def leading(**arrays: tuple[Any, int]) -> tuple[int, ...]:
    """The common leading shape of `arrays`, each given with the number of its trailing axes; None is skipped.

    Raises
    ------
    ShapeError
        The leading axes do not broadcast together.
    """
    common: tuple[int, ...] = ()
    first = ""
    for argument, (array, trailing) in arrays.items():
        if array is None:
            continue
        axes = tuple(array.shape[: max(array.ndim - trailing, 0)])
        width = max(len(axes), len(common))
        a, b = (1,) * (width - len(axes)) + axes, (1,) * (width - len(common)) + common
        if any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
            raise ShapeError(
                argument,
                f"leading axes that broadcast with {common} of {first}",
                str(axes),
                "Give both the same leading axes, or 1 where one serves all.",
            )
        common, first = tuple(x if y == 1 else y for x, y in zip(a, b, strict=True)), first or argument
    return common


def plain(argument: str, value: Any) -> np.ndarray:
    """`value`, a number or nested sequences of numbers, as a float64 array of its own.

    Raises
    ------
    DTypeError
    """
    try:
        array = np.asarray(to_numpy(value) if framework(value) is not None else value)
    except (TypeError, ValueError):  # rows of unequal length
        array = np.empty(0, object)
    if array.dtype.kind not in "fiu":
        raise DTypeError(argument, "numbers", type(value).__name__, f"Pass {argument} as floats.")
    return array.astype(np.float64)


def generator(argument: str, value: Any) -> None:
    """`value` is None or draws random numbers as NumPy's generators do.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(value, np.random.Generator | None):
        raise ArgumentError(
            argument, "a numpy.random.Generator", type(value).__name__, f"Pass {argument}=np.random.default_rng(0)."
        )


def count(argument: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value` as an int of at least `least`, and at most `most` if that is given.

    Raises
    ------
    ArgumentError
    """
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ArgumentError(argument, f"a whole number of at least {least}", repr(value), f"Pass {argument}={least}.")
    if most is not None and number > most:
        raise ArgumentError(argument, f"a whole number of at most {most}", repr(value), f"Pass {argument}={most}.")
    return int(number)


def addressable(**sizes: int) -> None:
    """A process could address as many bytes as the product of `sizes`.

    Raises
    ------
    ArgumentError
        It names the largest.
    """
    if math.prod(sizes.values()) > ADDRESSES:
        largest = max(sizes, key=lambda name: sizes[name])
        expected = f"{' x '.join(sizes)} of at most {ADDRESSES}, which is all a process can address"
        raise ArgumentError(largest, expected, repr(sizes[largest]), f"Pass a smaller {largest}.")


def neighbours(value: Any, stored: int) -> int:
    """`value` as a count of neighbours: as many as there are keys, and some more, but no result that fills the memory.

    Raises
    ------
    ArgumentError
    """
    k, most = count("k", value), max(stored, MANY)
    if k > most:
        expected = f"at most {most} neighbours, of {stored} keys"
        raise ArgumentError("k", expected, repr(value), "Pass the number of neighbours to attend to, k=32 as a rule.")
    return k


def number(argument: str, value: Any, above: float = -math.inf, below: float = math.inf) -> float:
    """`value` as a finite float strictly between `above` and `below`.

    Raises
    ------
    ArgumentError
    """
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not above < result < below:  # NaN neither
        bounded = math.isfinite(above) and math.isfinite(below)
        expected = f"a number strictly between {above:g} and {below:g}" if bounded else "a finite number"
        remedy = f"{argument}={(above + below) / 2:g}" if bounded else f"{argument} as a float"
        raise ArgumentError(argument, expected, repr(value)[:80], f"Pass {remedy}.")
    return result


def positive(argument: str, value: Any) -> float:
    """`value` as a finite float above 0.

    Raises
    ------
    ArgumentError
    """
    number = float(value) if not isinstance(value, bool) and isinstance(value, numbers.Real) else math.nan
    if not 0 < number < math.inf:
        raise ArgumentError(argument, "a finite number above 0", repr(value), f"Pass {argument}=1.0, for example.")
    return number


def flag(argument: str, value: Any) -> bool:
    """`value` as True or False, not by what is empty and what is not: "no" is neither.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(argument, "True or False", repr(value)[:80], f"Pass {argument}=True, for example.")
    return bool(value)


def choice(argument: str, value: Any, known: tuple[str, ...]) -> str:
    """`value`, if it is one of `known`.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(argument, f"one of {', '.join(known)}", repr(value), f"Pass {argument}={known[0]!r}.")
    return value


def mask(mask: Any, lead: tuple[int, ...], queries: int, keys: int) -> None:
    """`mask` is boolean and broadcasts to (..., queries, keys).

    Raises
    ------
    ShapeError, DTypeError
    """
    if mask is None:
        return
    if framework(mask) is None or not namespace(mask).isdtype(mask.dtype, "bool"):
        raise DTypeError("mask", "a boolean array", str(getattr(mask, "dtype", type(mask))), "Pass mask.astype(bool).")
    full = (*lead, queries, keys)
    axes = tuple(mask.shape)
    if len(axes) > len(full) or any(m not in (1, f) for m, f in zip(axes[::-1], full[::-1], strict=False)):
        raise ShapeError("mask", f"a shape that broadcasts to {full}", str(axes), "Add or drop leading axes.")


def within(argument: str, array: Any, least: float, most: float) -> None:
    """Every number of `array` is between `least` and `most`, both allowed; a GPU is not made to wait, and not asked.

    Raises
    ------
    ArgumentError
    """
    xp = namespace(array)
    if not inspectable(array) or 0 in array.shape:
        return
    if not (bool(xp.min(array) >= least) and bool(xp.max(array) <= most)):
        raise ArgumentError(
            argument, f"numbers from {least} to {most}", "one outside", f"Check what {argument} refers to."
        )


def finite(**arrays: Any) -> None:
    """Every number of every array is finite; None is skipped.

    Raises
    ------
    NonFiniteError
    """
    for argument, array in arrays.items():
        if array is not None and not all_finite(array):
            raise NonFiniteError(argument, "finite numbers", "NaN or infinity", f"Clean {argument} before passing it.")


def all_finite(array: Any) -> bool:
    """Whether no number is NaN or infinite: as a rule their sum tells, and only where it cannot, each is looked at."""
    xp = namespace(array)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(xp.isfinite(xp.sum(array))) or bool(xp.all(xp.isfinite(array)))


def outcome(result: Any, **arrays: Any) -> None:
    """`result` is finite; where it is not, one of `arrays`, which it was computed from, is to blame.

    Looks at what was made rather than at what was given, which may hold anything where it does not count. Not done on
    a GPU, which would have to be waited for, nor inside a compiled graph.

    Raises
    ------
    NonFiniteError
    """
    if not inspectable(result) or all_finite(result):
        return
    finite(**arrays)
    first, *others = arrays
    expected, received = "products and sums within the range of the dtype", "some beyond it"
    raise NonFiniteError(first, expected, received, f"Normalise or scale {', '.join([first, *others])}.")


def measurable(**vectors: Any) -> None:
    """Every vector (last axis) has a squared norm that its computing dtype holds; None is skipped.

    Rules out NaN, infinity and, by Cauchy-Schwarz, every overflow of q·k and |q-k|² later. As a rule the norm of all
    vectors together tells, and only where it cannot, each is looked at.

    Raises
    ------
    NonFiniteError
    """
    for argument, array in vectors.items():
        if array is None:
            continue
        xp = namespace(array)
        wide = cast(array, computing_dtype(array))
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is about to be told
            together = xp.reshape(wide, (-1,))
            if bool(xp.isfinite(4 * xp.vecdot(together, together))):
                continue
            squares = 4 * xp.vecdot(wide, wide)
        if not bool(xp.all(xp.isfinite(squares))):
            finite(**{argument: array})
            raise NonFiniteError(
                argument,
                "vectors whose squared norm stays within the dtype's range",
                "one that overflows it",
                f"Normalise or scale {argument}.",
            )
