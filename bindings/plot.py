"""Pictures of continuous memories; `perdure.plot`, needs matplotlib (`pip install "perdure[plot]"`).

Every function returns a matplotlib Figure that belongs to no window: save it with `figure.savefig(path)`, or let a
notebook show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from ..backends.arrays import optional_import
from ..backends.errors import ArgumentError, ShapeError
from ..backends.exchange import like, to_numpy
from ..core import checks
from ..core.positions import centred
from ..core.report import SignalReport
from ..core.signal import Signal
from ..memory.continuous import ContinuousMemory

__all__ = ["attention", "error", "retained", "signal"]
Kind = TypeVar("Kind")
POINTS = 1000  # at which a curve is drawn


def signal(fitted: Signal, x: Any = None, positions: Any = None, components: Sequence[int] | None = None) -> Any:
    """A signal against the samples it was fitted to.

    Parameters
    ----------
    fitted : Signal
        With coefficients (N, e).
    x : array (L, e), optional
        The samples.
    positions : array (L,), optional
        Where they stand; the midpoints of L equal parts by default.
    components : sequence of int, optional
        Which of the e; the first four by default.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingPackageError, ArgumentError, ShapeError
    """
    B = _of("fitted", fitted, Signal, "what perdure.fit returned").coefficients
    if B.ndim != 2:
        raise ShapeError("fitted", "a signal without leading axes", str(tuple(B.shape)), "Take one row of it.")
    if not isinstance(components, Iterable | None):
        raise ArgumentError("components", "a sequence of numbers", repr(components), f"Pass [{components!r}].")
    shown = range(min(B.shape[1], 4)) if components is None else [checks.count("components", c, 0) for c in components]
    if any(c >= B.shape[1] for c in shown):
        raise ArgumentError("components", f"numbers below {B.shape[1]}", str(list(shown)), "Name existing components.")
    t = np.linspace(0, 1, POINTS)
    curve = to_numpy(fitted(like(t, B)))
    figure, axis = _figure(8, 3.2)
    for c in shown:
        axis.plot(t, curve[:, c], color=f"C{c}", linewidth=1, label=f"component {c}")
    if x is not None:
        samples = checks.plain("x", x)
        checks.shape("x", samples, "L", B.shape[1], whole=True)
        where = centred(samples.shape[0]) if positions is None else checks.plain("positions", positions)
        checks.shape("positions", where, samples.shape[0], whole=True)
        for c in shown:
            axis.plot(where, samples[:, c], ".", color=f"C{c}", markersize=2, alpha=0.5)
    axis.set(xlabel="t", ylabel="x(t)", xlim=(0, 1), title=repr(fitted.basis).strip("<>"))
    axis.legend(fontsize="small")
    return figure


def attention(histograms: Any) -> Any:
    """Where attention looked over time.

    Parameters
    ----------
    histograms : array (writes, D)
        Attention over D equal bins of [0, 1] before each write, of any scale.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingPackageError, ShapeError
    """
    mass = checks.plain("histograms", histograms)
    checks.shape("histograms", mass, "writes", "D", whole=True)
    if mass.size == 0:
        raise ShapeError("histograms", "one write or more, and one bin", str(mass.shape), "Pass what was attended to.")
    checks.finite(histograms=mass)
    if (mass < 0).any():
        raise ArgumentError(
            "histograms", "mass of at least 0", f"{mass.min():.4g}", "Pass attention, not its logarithm."
        )
    total = mass.sum(axis=1, keepdims=True)
    shares = mass / np.where(total > 0, total, 1) * mass.shape[1]
    figure, axis = _figure(7, 3.6)
    image = axis.imshow(
        shares, aspect="auto", origin="lower", extent=(0, 1, 0.5, mass.shape[0] + 0.5), interpolation="nearest"
    )
    axis.set(xlabel="place in the memory: 0 the oldest, 1 the newest", ylabel="write")
    figure.colorbar(image, label="attention, over even attention")
    return figure


def retained(memory: ContinuousMemory, row: int = 0) -> Any:
    """What a memory kept and what faded: how much room each token of the history has, by its age.

    Parameters
    ----------
    memory : ContinuousMemory
    row : int

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingPackageError, ArgumentError
        Nothing has been written to the row.
    """
    if not hasattr(memory, "shown"):  # one that lives in a store has it too
        received = type(memory).__name__
        raise ArgumentError("memory", "a ContinuousMemory", received, "Pass one, of a HybridMemory its `older` part.")
    t = np.linspace(0, 1, POINTS + 1)
    shown = memory.shown(t, [row])[0]
    if not shown[-1] > 0:
        raise ArgumentError("memory", f"something written to row {row}", "nothing", "Write to it first.")
    figure, axis = _figure(7, 3.2)
    tokens = np.arange(np.ceil(shown[-1])) + 0.5
    counts = np.diff(np.interp(np.append(tokens - 0.5, shown[-1]), shown, t))
    axis.semilogy(shown[-1] - tokens, np.maximum(counts * len(memory.basis), 1e-6), linewidth=0.8)
    axis.axhline(1, color="black", linewidth=0.6, linestyle="--")
    axis.set(
        xlabel="age in tokens",
        ylabel="basis functions a token",
        title=f"{int(shown[-1])} tokens in {len(memory.basis)} functions",
    )
    return figure


def error(*reports: SignalReport, names: Sequence[str] | None = None) -> Any:
    """Predicted relative error of a segment by its age.

    Parameters
    ----------
    *reports : SignalReport
        `reports` of the memories to compare.
    names : sequence of str, optional
        What the legend calls them.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingPackageError, ArgumentError
    """
    for report in reports:
        _of("reports", report, SignalReport, "memory.report()")
    named = names is None or (isinstance(names, list | tuple) and len(names) == len(reports))
    if not reports or not named:
        raise ArgumentError("reports", "one or more, and a name for each", str(len(reports)), "Pass memory.report().")
    figure, axis = _figure(6, 3.2)
    for i, report in enumerate(reports):
        ages = np.arange(report.error_by_age.size) * report.segment
        label = f"{report.features} features in {report.segment}" if names is None else names[i]
        axis.plot(ages, report.error_by_age, marker=".", label=label)
    axis.axhline(0.5, color="black", linewidth=0.6, linestyle="--")
    axis.set(xlabel="age in tokens", ylabel="relative error", ylim=(0, 1))
    axis.legend(fontsize="small")
    return figure


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure without a window or global state, and its axes."""
    made = optional_import("matplotlib.figure", extra="plot").Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots()


def _of(argument: str, given: Any, kind: type[Kind], remedy: str) -> Kind:
    """`given`, if it is of that kind.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(given, kind):
        raise ArgumentError(argument, f"a {kind.__name__}", type(given).__name__, f"Pass {remedy}.")
    return given
