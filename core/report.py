"""What a signal of a given size can hold, and for how long: predicted from the linear algebra, before any data come."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..backends.errors import ArgumentError
from . import checks
from .basis import gaussian_basis
from .consolidation import Scheme
from .positions import centred

AGES = 33  # updates looked ahead
LOST = 0.5  # relative error from which a segment counts as forgotten
AROUND = (0.5, 0.75, 1.0, 1.4)  # what is tried for 1 - contraction, over 1/(updates + 1)
WASTED = 0.5  # degrees of freedom over N below which functions are wasted


@dataclass(frozen=True)
class SignalReport:
    """What to expect of a signal.

    Attributes
    ----------
    degrees_of_freedom : float
        Independent numbers kept of each component, tr(A (A + lambda I)^-1), A = F F^T: at most N, and at most the
        samples. Of a signal by the fit or update it came from; of a memory by every later write, which sees M samples
        of the old signal too.
    segment, features : int
        Samples an update brings, and how many independent features these were taken to carry.
    error_by_age : float64 array (ages,)
        Predicted relative root-mean-square error of a segment after 0, 1, ... further updates (not sticky).
    horizon : int
        Age in tokens up to which the predicted error stays below one half.
    advice : tuple of str
        What to change, where something is wasted.
    """

    degrees_of_freedom: float
    segment: int
    features: int
    error_by_age: np.ndarray
    horizon: int
    advice: tuple[str, ...]

    def __str__(self) -> str:
        errors = ", ".join(f"{e:.2g}" for e in self.error_by_age[:9])
        lines = [
            f"degrees of freedom: {self.degrees_of_freedom:.0f}",
            f"error by age, in updates of {self.segment} with {self.features} features each: {errors}",
            f"horizon: {self.horizon} tokens",
        ]
        return "\n".join([*lines, *self.advice])


def signal_report(
    scheme: Scheme, length: int, contraction: float, features: int | None, freedom: float | None = None
) -> SignalReport:
    """The report of a signal updated by `scheme` with segments of `length` samples; see Signal.report.

    `freedom`: the degrees of freedom of what it is now, those of an update by default.
    """
    features = supposed_features(features, length)
    errors = predicted_errors(scheme, length, contraction, features)
    lasting = int(np.argmax(errors > LOST)) if (errors > LOST).any() else len(errors)
    n = len(scheme.basis)
    freedom = scheme.later(contraction, length).degrees_of_freedom if freedom is None else freedom
    advice = []
    if freedom < WASTED * n:
        advice.append(
            f"{n} functions carry only {freedom:.0f} degrees of freedom: narrow the widths (None scales them to N), "
            f"lower the ridge, take more samples, or take fewer functions."
        )
    return SignalReport(freedom, length, features, errors, lasting * length, tuple(advice))


def supposed_features(features: int | None, length: int) -> int:
    """`features` of a segment of `length` samples: from 1 to all of them, a sixteenth where it is not said.

    Raises
    ------
    ArgumentError
    """
    return checks.count("features", max(length // 16, 1) if features is None else features, most=length)


def smallest_scheme(
    tokens: int, error: float, ridge: float, length: int, features: int, most: int
) -> tuple[Scheme, float]:
    """The scheme of fewest functions, with its contraction, that predicts at most `error` for what came `tokens` ago.

    Raises
    ------
    ArgumentError
        No number of functions up to `most` does.
    """
    # A segment of that age has the share tau^age (1 - tau) of the functions, the largest at tau = age/(age + 1).
    age, best = -(-tokens // length), np.inf
    shares = [1 - part / (age + 1) for part in AROUND if part < age + 1]
    n = 2 ** max(5, math.floor(math.log2(features / max(tau**age * (1 - tau) for tau in shares))) - 1)
    n = min(n, 2 ** int(math.log2(most)))  # so that the message can say what the most functions reach
    while n <= most:
        scheme = Scheme(gaussian_basis(n), ridge, 512)
        found = {tau: predicted_error(scheme, length, tau, features, age) for tau in shares}
        contraction = min(found, key=found.__getitem__)
        best = min(best, found[contraction])
        if best <= error:
            return scheme, contraction
        n *= 2
    raise ArgumentError(
        "error",
        f"at least {best:.2g}, the least that {most} functions reach at {tokens} tokens",
        f"{error:.2g}",
        "Allow more error or more functions, ask for a nearer horizon, or suppose fewer features a segment.",
    )


def predicted_error(scheme: Scheme, length: int, contraction: float, features: int, age: int) -> float:
    """Predicted relative error of a segment after `age` further updates."""
    return float(predicted_errors(scheme, length, contraction, features, age + 1)[age])


@functools.lru_cache(maxsize=64)
def predicted_errors(scheme: Scheme, length: int, contraction: float, features: int, ages: int = AGES) -> np.ndarray:
    """Relative error of a segment after k = 0 ... further updates, (ages,): |R_k X - X|/|X| over a reference X.

    Everything is linear: R_k = Psi(where the segment has moved to) C^k G_new^T. X holds the lowest `features` cosines
    of the segment, of equal power: a signal of that many independent features.
    """
    operator = scheme.later(contraction, length)
    C = scheme.recurrence(operator, contraction)  # (N, N)
    positions = scheme.new_positions(contraction, length)
    X = np.cos(np.pi * centred(length)[:, None] * np.arange(features))  # (L, features)
    B = operator.matrix[:, scheme.looks(contraction) :] @ X
    errors = np.empty(ages)
    for k in range(ages):
        errors[k] = np.linalg.norm(scheme.basis(positions) @ B - X) / np.linalg.norm(X)
        B, positions = C @ B, contraction * positions
    errors.setflags(write=False)
    return errors
