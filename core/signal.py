"""A signal x(t) = sum_j B_j psi_j(t) on [0, 1]: fitted to samples, evaluated anywhere, made longer at a fixed size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..backends.arrays import cast, computing_dtype, framework
from ..backends.errors import ArgumentError, ShapeError
from ..backends.exchange import to_numpy
from . import checks
from .basis import Basis, positions_in
from .consolidation import Scheme, apply, updated
from .cross_validation import validated_ridge
from .positions import centred, resample
from .report import SignalReport, signal_report
from .ridge import fit_operator


@dataclass(frozen=True, eq=False, repr=False)
class Signal:
    """A continuous signal by its coefficients.

    Attributes
    ----------
    coefficients : array (..., N, e)
        B, in at least float32.
    basis : Basis
        psi.
    ridge : float
        Relative penalty of every fit.
    dtype : dtype
        That of the samples, which evaluations come back in.
    segment : int
        How many samples the last fit or update brought.
    original : bool
        Whether positions, padding and penalty follow the authors' code; `ridge` is then lambda itself.
    degrees_of_freedom : float, optional
        How many independent numbers of each component the last fit or update kept, where that is known.
    """

    coefficients: Any
    basis: Basis
    ridge: float
    dtype: Any
    segment: int
    original: bool = False
    degrees_of_freedom: float | None = None

    def __repr__(self) -> str:
        lead, width = tuple(self.coefficients.shape[:-2]), self.coefficients.shape[-1]
        return f"<signal of width {width}, leading axes {lead}, on {self.basis!r}>"

    def __call__(self, t: Any) -> Any:
        """The signal at positions `t`.

        Parameters
        ----------
        t : array (T,) or (..., T), or a sequence of plain numbers
            Positions in [0, 1], of the signal's framework.

        Returns
        -------
        array (..., T, e)

        Raises
        ------
        FrameworkError, DTypeError, NonFiniteError, ArgumentError, ShapeError

        Notes
        -----
        O(T N e). Gradients reach the coefficients and `t`.
        """
        t = positions_in("t", t, coefficients=self.coefficients)
        checks.shape("t", t, "T")
        checks.leading(coefficients=(self.coefficients, 2), t=(t, 1))
        psi = self.basis(cast(t, self.coefficients.dtype))  # (..., T, N)
        return cast(psi @ self.coefficients, self.dtype)

    def update(
        self,
        x_new: Any,
        contraction: float = 0.5,
        samples: int = 512,
        where: Any = None,
        rng: np.random.Generator | None = None,
    ) -> Signal:
        """The signal squeezed into [0, contraction], with new samples in the room that makes.

        Parameters
        ----------
        x_new : array (..., L, e)
            Any L of at least 1; leading axes as the signal's.
        contraction : float
            tau, strictly between 0 and 1.
        samples : int
            M: at how many positions at least the old signal is looked at; narrow functions ask for more.
        where : array (..., D), optional
            Attention over D equal bins of [0, 1]: the old signal is looked at where its mass lies (sticky memory), and
            uniformly in rows without mass. Leading axes broadcast to the signal's.
        rng : numpy.random.Generator, optional
            Offsets the positions of a sticky update, one draw a row; without it they are the central ones.

        Returns
        -------
        Signal
            Of the same size. This one is left as it is.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError

        Notes
        -----
        Without `where` B' = C B + G^T X, with C (N, N) made once: O(N² e + N L e). With it O(M N e) more.
        Gradients reach the coefficients and `x_new`. Source: ∞-former (arXiv 2109.00301), sections 3.2 and 3.3.
        Differs from the paper in that both parts are sampled at midpoints.
        """
        tau, M = checks.number("contraction", contraction, 0, 1), checks.count("samples", samples)
        B = self.coefficients
        checks.floating_arrays(coefficients=B, x_new=x_new)
        checks.shape("x_new", x_new, *B.shape[:-2], "L", B.shape[-1])
        if x_new.ndim != B.ndim or x_new.shape[-2] == 0:
            wanted = f"leading axes {tuple(B.shape[:-2])} and L of at least 1"
            raise ShapeError("x_new", wanted, str(tuple(x_new.shape)), "Pass as many rows as the signal has.")
        checks.measurable(x_new=x_new)
        checks.generator("rng", rng)
        x_new = cast(x_new, B.dtype)
        scheme, length = Scheme(self.basis, self.ridge, M, self.original), x_new.shape[-2]
        at = None if where is None else resample(self._histogram(where), scheme.looks(tau), rng)
        made = updated(scheme, B, x_new, tau, at)
        freedom = scheme.later(tau, length).degrees_of_freedom
        if self.degrees_of_freedom is not None:
            freedom = min(freedom, self.degrees_of_freedom + length)  # however often the old signal is looked at
        return replace(self, coefficients=made, segment=length, degrees_of_freedom=freedom)

    def _histogram(self, where: Any) -> np.ndarray:
        """`where` as float64 (..., D) in host memory, with the signal's leading axes."""
        if framework(where) is None:
            where = checks.plain("where", where)
        checks.floating_arrays(where=where)
        checks.shape("where", where, "D")
        lead = tuple(self.coefficients.shape[:-2])
        common = checks.leading(coefficients=(self.coefficients, 2), where=(where, 1))
        if where.shape[-1] == 0 or where.ndim - 1 > len(lead) or common != lead:
            raise ShapeError("where", f"(..., D) with leading axes {lead}", str(tuple(where.shape)), "Reshape it.")
        return np.broadcast_to(to_numpy(where).astype(np.float64), (*lead, where.shape[-1]))

    def report(
        self,
        segment: int | None = None,
        contraction: float = 0.5,
        samples: int = 512,
        features: int | None = None,
    ) -> SignalReport:
        """What this signal holds, and for how long if it is updated from here on with segments of `segment` samples.

        Parameters
        ----------
        segment : int, optional
            L; that of the last fit or update by default.
        contraction : float
        samples : int
        features : int, optional
            How many independent features a segment carries, from 1 to L; L/16 by default, at least 1.

        Returns
        -------
        SignalReport

        Raises
        ------
        ArgumentError
        """
        scheme = Scheme(self.basis, self.ridge, checks.count("samples", samples), self.original)
        length = self.segment if segment is None else checks.count("segment", segment)
        tau = checks.number("contraction", contraction, 0, 1)
        return signal_report(scheme, length, tau, features, self.degrees_of_freedom)


def fit(x: Any, basis: Basis, ridge: float | str = 1e-3, positions: Any = None) -> Signal:
    """The signal on `basis` nearest to samples, by ridge regression.

    Parameters
    ----------
    x : array (..., L, e)
        L samples of e numbers.
    basis : Basis
    ridge : float or "gcv"
        Penalty on the coefficients, relative to the mean square of a basis function over the samples; at least 0.
        "gcv": that which generalised cross-validation finds best for all components of `x` together.
    positions : array (L,), optional
        Where in [0, 1] the samples stand, the same for all leading axes; the midpoints of L equal parts by default.

    Returns
    -------
    Signal
        With coefficients (..., N, e).

    Raises
    ------
    ShapeError, DTypeError, FrameworkError, NonFiniteError
        Arrays that do not fit, or that hold NaN or infinity.
    ArgumentError
        L of 0, positions outside [0, 1], samples that no basis function reaches, or a ridge so small that the fit has
        no meaning.

    Notes
    -----
    The factorisation is made in float64 once for a basis, positions and ridge, and shared: O(N² (N + L)). After that a
    fit is one matrix product, O(N L e). Gradients reach `x`.
    Source: ∞-former (arXiv 2109.00301), equations 4 to 6. Differs from the paper in the scale of the penalty and in
    fitting no zeros outside [0, 1].

    Examples
    --------
    >>> import numpy as np, perdure
    >>> x = np.sin(np.linspace(0, 6, 200))[:, None]
    >>> signal = perdure.fit(x, perdure.gaussian_basis(32), ridge=1e-4)
    >>> bool(abs(signal([0.5])[0, 0] - np.sin(3)) < 1e-3)
    True
    """
    checks.floating_arrays(x=x)
    checks.shape("x", x, "L", "e")
    length = x.shape[-2]
    if length == 0:
        raise ShapeError("x", "at least one sample, (..., L, e)", str(tuple(x.shape)), "Pass samples to fit.")
    if not isinstance(basis, Basis):
        raise ArgumentError("basis", "a Basis", type(basis).__name__, "Pass perdure.gaussian_basis(n).")
    fixed = None if isinstance(ridge, str) and ridge == "gcv" else penalty(ridge)
    checks.measurable(x=x)
    where = centred(length)
    if positions is not None:
        positions = positions_in("positions", positions, x=x)
        if tuple(positions.shape) != (length,):
            raise ShapeError("positions", f"({length},)", str(tuple(positions.shape)), "Pass one position a sample.")
        where = to_numpy(positions).astype(np.float64)
    wide = cast(x, computing_dtype(x))
    used = validated_ridge(x, basis, where) if fixed is None else fixed
    operator = fit_operator(basis, where, used)
    coefficients = apply(operator.key, operator.matrix, wide)
    return Signal(coefficients, basis, used, x.dtype, length, degrees_of_freedom=operator.degrees_of_freedom)


def weighted(seen: Any, B: Any, dtype: Any) -> Any:
    """E[x(t)] = E[psi(t)]^T B in `dtype`, from `seen`, E[psi(t)], of every query: (..., q, N) -> (..., q, e)."""
    return cast(cast(seen, B.dtype) @ B, dtype)


def looked_at(signal: Any) -> Any:
    """The coefficients of `signal`, if it is one.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(signal, Signal):
        raise ArgumentError("signal", "a Signal", type(signal).__name__, "Pass what perdure.fit returned.")
    return signal.coefficients


def penalty(ridge: Any) -> float:
    """`ridge` as a float from 0 to 1e100: what a penalty is multiplied with must not overflow.

    Raises
    ------
    ArgumentError
    """
    try:
        number = float(ridge)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 1e100:
        raise ArgumentError("ridge", "a finite number of at least 0, 1e100 at most", repr(ridge), "Pass ridge=1e-3.")
    return number
