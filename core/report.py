"""What a signal of a given size can hold, and for how long: predicted from the linear algebra, before any data come."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from . import checks
from .basis import Basis
from .positions import after_contraction, centred, fraction
from .ridge import fit_operator

AGES = 33  # updates looked ahead
LOST = 0.5  # relative error from which a segment counts as forgotten
WASTED = 0.5  # degrees of freedom over N below which functions are wasted


@dataclass(frozen=True)
class SignalReport:
    """What to expect of a signal.

    Attributes
    ----------
    degrees_of_freedom : float
        Independent numbers that a fit keeps of each component: tr(A (A + lambda I)^-1), A = F F^T; at most N.
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
    basis: Basis, ridge: float, segment: int, contraction: float, samples: int, features: int | None
) -> SignalReport:
    """The report of a signal on `basis` updated with segments of `segment` samples; see Signal.report."""
    length, M = checks.count("segment", segment), checks.count("samples", samples)
    tau = fraction("contraction", contraction)
    features = checks.count("features", max(length // 16, 1) if features is None else features)
    errors = predicted_errors(basis, ridge, length, tau, M, min(features, length))
    lasting = int(np.argmax(errors > LOST)) if (errors > LOST).any() else len(errors)
    freedom = fit_operator(basis, np.concatenate(after_contraction(tau, M, length)), ridge).degrees_of_freedom
    advice = []
    if freedom < WASTED * len(basis):
        advice.append(
            f"{len(basis)} functions carry only {freedom:.0f} degrees of freedom: narrow the widths "
            f"(widths=None scales them to N), lower the ridge, take more samples, or take fewer functions."
        )
    return SignalReport(freedom, length, min(features, length), errors, lasting * length, tuple(advice))


@functools.lru_cache(maxsize=32)
def predicted_errors(basis: Basis, ridge: float, length: int, tau: float, M: int, features: int) -> np.ndarray:
    """Relative error of a segment after k = 0 ... further updates, (AGES,): |R_k X - X|/|X| over a reference X.

    Everything is linear: R_k = Psi(where the segment has moved to) C^k G_new^T. X holds the lowest `features` cosines
    of the segment, of equal power: a signal of that many independent features.
    """
    operator = fit_operator(basis, np.concatenate(after_contraction(tau, M, length)), ridge)
    C = operator.matrix[:, :M] @ basis(centred(M))  # (N, N)
    inside = centred(length)
    X = np.cos(np.pi * inside[:, None] * np.arange(features))  # (L, features)
    B, where = operator.matrix[:, M:] @ X, tau + (1 - tau) * inside
    errors = np.empty(AGES)
    for k in range(AGES):
        errors[k] = np.linalg.norm(basis(where) @ B - X) / np.linalg.norm(X)
        B, where = C @ B, tau * where
    errors.setflags(write=False)
    return errors
