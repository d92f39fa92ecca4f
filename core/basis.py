"""Basis functions psi_j on [0, 1]: what a signal is a sum of."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends import kernel
from ..backends.arrays import computing_dtype, framework, inspectable, namespace
from ..backends.errors import ArgumentError, NonFiniteError, ShapeError
from ..backends.exchange import like as like_of
from . import checks

KINDS = ("gaussian", "rectangular")
FELT = {4: 5.5, 8: 9.0}  # by itemsize: in widths, how far from its centre a function is more than rounding of its peak
SPREAD = 0.75  # default width over spacing: N functions keep nearly N degrees of freedom and stay well conditioned


@dataclass(frozen=True, eq=False, repr=False)
class Basis:
    """N basis functions on [0, 1], by centre and width.

    Parameters
    ----------
    centers, widths : sequences of N numbers
        Gaussian: mean and standard deviation. Rectangular: midpoint and full width of each bin.
    kind : {"gaussian", "rectangular"}
        Gaussian: psi_j(t) is the normal density, 1/(w sqrt(2 pi)) high at its centre. Rectangular: 1 inside the bin,
        0 outside; a point on an edge belongs to the bin on its right, the last edge to the last bin.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, NonFiniteError
        Nothing but the shapes, numbers, finiteness and sign is checked here, so that any published basis can be built;
        `gaussian_basis` also refuses holes between neighbours.

    Notes
    -----
    Two bases with equal numbers are equal, and share every factorisation made for either.
    """

    centers: np.ndarray
    widths: np.ndarray
    kind: str = "gaussian"

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, KINDS)
        for name in ("centers", "widths"):
            array = checks.plain(name, getattr(self, name))
            if array.ndim != 1 or array.size == 0:
                raise ShapeError(name, "shape (N,), N of at least 1", str(array.shape), "Pass a number a function.")
            if not np.isfinite(array).all():
                raise NonFiniteError(name, "finite numbers", "NaN or infinity", f"Clean {name} before passing it.")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.centers.shape != self.widths.shape:
            raise ShapeError("widths", str(self.centers.shape), str(self.widths.shape), "Pass one width a centre.")
        if not (self.widths > 0).all():
            raise ArgumentError("widths", "numbers above 0", f"{self.widths.min():.4g}", "Pass positive widths.")
        low, high = self.centers - self.widths / 2, self.centers + self.widths / 2
        if self.kind == "rectangular" and not np.allclose(low[1:], high[:-1], rtol=0, atol=1e-12):
            raise ArgumentError("centers", "adjoining bins in ascending order", "others", "Use rectangular_basis(n).")

    @functools.cached_property
    def key(self) -> tuple[str, bytes, bytes]:
        """What tells this basis from another."""
        return self.kind, self.centers.tobytes(), self.widths.tobytes()

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """The N + 1 edges of adjoining bins, float64, exactly i/N where they are so; of a rectangular basis only."""
        edges = np.append(self.centers - self.widths / 2, self.centers[-1] + self.widths[-1] / 2)
        equal = np.arange(len(self) + 1) / len(self)
        return equal if np.abs(edges - equal).max() <= 4 * np.finfo(np.float64).eps else edges

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __len__(self) -> int:
        return self.centers.size

    def __repr__(self) -> str:
        widths = ", ".join(f"{w:.4g}" for w in np.unique(self.widths)[:4])
        return f"<{self.kind} basis of {len(self)}, widths {widths}>"

    def __call__(self, t: Any) -> Any:
        """Every basis function at every position.

        Parameters
        ----------
        t : array (...,)
            Positions; the signal lives on [0, 1], but any finite number is allowed.

        Returns
        -------
        array (..., N)
            In the framework, device and dtype of `t`.

        Raises
        ------
        FrameworkError, DTypeError
        """
        checks.floating_arrays(t=t)
        if self.kind == "rectangular":
            return rectangles(t, *self.beside(t, edges=True))
        return gaussians(t, *self.beside(t))

    @functools.cached_property
    def ascending(self) -> bool:
        """Whether these are Gaussians in the order of their centres, so that neighbours in number are so in place."""
        return self.kind == "gaussian" and bool((np.diff(self.centers) >= 0).all())

    def felt(self, low: float, high: float, itemsize: int = 8) -> slice:
        """Which functions are felt from `low` to `high`, by numbers of `itemsize` bytes; all, if in no order."""
        if not self.ascending:
            return slice(0, len(self))
        reach = FELT[itemsize] * self.widths.max()
        first, last = np.searchsorted(self.centers, [low - reach, high + reach])
        return slice(int(first), int(last))

    def near(self, t: np.ndarray) -> tuple[slice, np.ndarray]:
        """Which functions are felt at positions `t` (T,), float64, and their values there: slice of n, (T, n)."""
        if not self.ascending or not t.size:
            return slice(0, len(self)), self(t)
        functions = self.felt(t.min(), t.max())
        return functions, gaussians(t, self.centers[functions], self.widths[functions])

    def sampled(self, functions: slice, t: np.ndarray) -> tuple[slice, np.ndarray]:
        """At which of ascending positions `t` (T,), `functions` are felt, and their values: slice of m and (m, n)."""
        if not self.ascending:
            return slice(0, t.size), self(t)[:, functions]
        centers, widths = self.centers[functions], self.widths[functions]
        reach = FELT[8] * self.widths.max()
        first, last = np.searchsorted(t, [centers[0] - reach, centers[-1] + reach])
        return slice(int(first), int(last)), gaussians(t[first:last], centers, widths)

    def beside(self, like: Any, edges: bool = False) -> tuple[Any, ...]:
        """Centres and widths (or only the `edges`) as arrays beside `like`, in the dtype it is computed in."""
        arrays = (self.edges,) if edges else (self.centers, self.widths)
        return tuple(like_of(a, like, computing_dtype(like)) for a in arrays)


def gaussian_basis(n: int, widths: float | Sequence[float] | None = None) -> Basis:
    """N Gaussians, evenly spread over [0, 1].

    Parameters
    ----------
    n : int
        How many; a multiple of the number of widths.
    widths : number or sequence of k numbers, optional
        Standard deviations. With k of them, n/k centres bear k functions each. None: three quarters of the
        spacing of the centres, so that detail grows with n.

    Returns
    -------
    Basis

    Raises
    ------
    ArgumentError
        n below 1 or no multiple of k; or every width below half the spacing of the centres, which leaves holes that
        no function reaches.
    DTypeError, NonFiniteError
        Widths that are no numbers, or not finite.

    Notes
    -----
    Source: ∞-former (arXiv 2109.00301), section 3.1. Differs from the paper in the default: its widths (.005 and .01;
    .01 and .05 for sorting) do not shrink with n, so that more functions add no detail.

    Examples
    --------
    >>> import perdure
    >>> perdure.gaussian_basis(5).centers.tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    n = checks.count("n", n)
    if widths is None:
        widths = SPREAD / max(n - 1, 1)
    each = np.atleast_1d(checks.plain("widths", widths))
    if each.ndim != 1 or each.size == 0 or n % each.size:
        raise ArgumentError(
            "n", f"a multiple of the {each.size} widths", str(n), f"Pass n={n + -n % max(each.size, 1)} or one width."
        )
    places = n // each.size
    centers = np.linspace(0, 1, places) if places > 1 else np.array([0.5])
    made = Basis(np.repeat(centers, each.size), np.tile(each, places))
    spacing = 1 / max(places - 1, 1)
    if each.max() < spacing / 2:
        raise ArgumentError(
            "widths",
            f"one of at least {spacing / 2:.4g}, half the spacing of the centres",
            f"{each.max():.4g}",
            "Raise n or the widths; what falls between the functions would be lost.",
        )
    return made


def rectangular_basis(n: int) -> Basis:
    """N adjoining bins of equal width that fill [0, 1].

    A fit to it is the mean of the samples in each bin, shrunk by the ridge, and the Gibbs density on it is a softmax
    over N slots.

    Parameters
    ----------
    n : int

    Returns
    -------
    Basis

    Raises
    ------
    ArgumentError
        n below 1.

    Notes
    -----
    Source: ∞-Video (arXiv 2501.19098), section 3.
    """
    n = checks.count("n", n)
    return Basis((np.arange(n) + 0.5) / n, np.full(n, 1 / n), "rectangular")


@kernel
def gaussians(t: Any, centers: Any, widths: Any) -> Any:
    """psi_j(t) = exp(-((t - mu_j)/sigma_j)²/2) / (sigma_j sqrt(2 pi)): (...,), (N,), (N,) -> (..., N)."""
    xp = namespace(t)
    z = (t[..., None] - centers) / widths
    return xp.exp(-0.5 * z * z) / (widths * math.sqrt(2 * math.pi))


def rectangles(t: Any, edges: Any) -> Any:
    """1 where edge_j <= t < edge_(j+1), the last edge included: (...,), (N + 1,) -> (..., N), in the dtype of `t`."""
    xp = namespace(t)
    t, low, high = t[..., None], edges[:-1], edges[1:]
    inside = (t >= low) & ((t < high) | ((t == edges[-1]) & (high == edges[-1])))
    return xp.astype(inside, t.dtype)


def positions_in(argument: str, t: Any, /, **beside: Any) -> Any:
    """`t` as an array of positions in [0, 1] beside the one array named in `beside`; plain numbers are taken too.

    Raises
    ------
    FrameworkError, DTypeError, NonFiniteError, ArgumentError
    """
    checks.floating_arrays(**beside)
    (like,) = beside.values()
    xp = namespace(like)
    if framework(t) is None:
        t = like_of(checks.plain(argument, t), like, computing_dtype(like))
    checks.floating_arrays(**beside, **({} if argument in beside else {argument: t}))
    checks.finite(**{argument: t})
    if inspectable(t) and not bool(xp.all((t >= 0) & (t <= 1))):
        raise ArgumentError(
            argument, "positions within [0, 1]", f"{float(xp.min(t)):.4g} to {float(xp.max(t)):.4g}", "Scale them."
        )
    return t


def edges_in(edges: Any, **beside: Any) -> Any:
    """`edges` as an ascending array (D + 1,) of positions in [0, 1], D of at least 1, as `positions_in` takes them.

    Raises
    ------
    FrameworkError, DTypeError, NonFiniteError, ArgumentError, ShapeError
    """
    edges = positions_in("edges", edges, **beside)
    checks.shape("edges", edges, "D + 1", whole=True)
    if edges.shape[0] < 2 or not bool(namespace(edges).all(edges[1:] >= edges[:-1])):
        raise ArgumentError("edges", "two positions or more, ascending", str(edges)[:80], "Sort them.")
    return edges
