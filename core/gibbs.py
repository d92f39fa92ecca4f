"""The Gibbs density p(t) ∝ exp(energy(t)) on a rectangular basis, where energy and signal are constant in every bin.

All integrals are sums over N bins: the density is a softmax over slots, where the published code sums 1000 points of
a trapezoidal rule for every query.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends.arrays import cast, computing_dtype, namespace
from ..backends.errors import ArgumentError
from ..backends.exchange import like as like_of
from ..backends.exchange import to_numpy
from . import checks
from .attention import masked_softmax
from .basis import Basis, edges_in
from .signal import Signal, looked_at, weighted


def gibbs_value(signal: Signal, energies: Any) -> Any:
    """What queries see that look at `signal` through p(t) ∝ exp(energy(t)).

    Parameters
    ----------
    signal : Signal
        On a rectangular basis, with coefficients (..., N, e).
    energies : array (..., q, N)
        Energy of every query in every bin: q·k_j, scaled, when the coefficients are projected to keys k_j.

    Returns
    -------
    array (..., q, e)
        In the dtype of the signal's samples.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError

    Notes
    -----
    O(q N e). Gradients reach the coefficients and the energies. Source: ∞-Video (arXiv 2501.19098), section 3. Differs
    from the authors' code in that the integrals are exact.

    Examples
    --------
    >>> import numpy as np, perdure
    >>> signal = perdure.fit(np.arange(8.0)[:, None], perdure.rectangular_basis(2), ridge=0.0)
    >>> perdure.gibbs_value(signal, np.array([[0.0, 0.0], [50.0, 0.0]])).round(6)
    array([[3.5],
           [1.5]])
    """
    B = looked_at(signal)
    checks.floating_arrays(signal=B, energies=energies)
    checks.leading(signal=(B, 2), energies=(energies, 2))
    return weighted(gibbs_shares(energies, signal.basis), B, signal.dtype)


def gibbs_mass(energies: Any, basis: Basis, edges: Any) -> Any:
    """Mass of each density between neighbouring edges: the histogram that sticky memory samples from.

    Parameters
    ----------
    energies : array (..., q, N)
    basis : Basis
        Rectangular.
    edges : array (D + 1,), or plain numbers
        Ascending, in [0, 1].

    Returns
    -------
    array (..., q, D)

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, FrameworkError, NonFiniteError
    """
    checks.floating_arrays(energies=energies)
    shares = gibbs_shares(energies, basis)
    edges = to_numpy(edges_in(edges, energies=energies))
    # the part of every bin left of every edge: cumulative, so that neighbours subtract
    below = np.clip((edges[:, None] - basis.edges[:-1]) / basis.widths, 0, 1)  # (D + 1, N)
    return shares @ like_of(np.ascontiguousarray((below[1:] - below[:-1]).T), shares)


def gibbs_shares(energies: Any, basis: Basis) -> Any:
    """Mass of each density in each bin, (..., q, N), in at least float32: softmax(energies + log widths).

    Raises
    ------
    ArgumentError, ShapeError, NonFiniteError
    """
    if not isinstance(basis, Basis) or basis.kind != "rectangular":
        raise ArgumentError("basis", "a rectangular basis", repr(basis)[:80], "Use perdure.rectangular_basis(n).")
    checks.shape("energies", energies, "q", len(basis))
    checks.finite(energies=energies)
    wide = cast(energies, computing_dtype(energies))
    logs = like_of(np.log(basis.widths), wide)
    return masked_softmax(wide + logs, namespace(wide).asarray(True, device=wide.device))[0]
