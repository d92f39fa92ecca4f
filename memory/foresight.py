"""What a continuous memory can hold, known in advance, and what its places show, known afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from ..backends.errors import ArgumentError
from ..core import checks
from ..core.basis import positions_in
from ..core.consolidation import Scheme
from ..core.report import SignalReport, signal_report, smallest_scheme, supposed_features
from ..core.signal import penalty
from .lock import ReadWriteLock, shared
from .rows import listed
from .signals import Signals


class Foresight:
    """Gives a ContinuousMemory its `for_horizon`, `report` and `shown`."""

    rows: int
    scheme: Scheme
    _lock: ReadWriteLock
    _signals: Signals
    _last_segment: int

    @classmethod
    def for_horizon(
        cls,
        tokens: int,
        error: float = 0.3,
        *,
        rows: int,
        dim: int,
        segment: int = 512,
        features: int | None = None,
        most: int = 2048,
        **settings: Any,
    ) -> Self:
        """The smallest memory that still recalls what came `tokens` ago with at most that predicted relative error.

        Parameters
        ----------
        tokens : int
            How far back.
        error : float
            In (0, 1).
        rows, dim : int
        segment : int
            Tokens a write brings.
        features : int, optional
            How many independent features a segment carries, from 1 to `segment`; segment/16 by default.
        most : int
            Largest N tried.
        **settings
            `settings` are passed on to the constructor.

        Returns
        -------
        ContinuousMemory
            With N a power of two, widths scaled to it, and the contraction that predicts the least error.

        Raises
        ------
        ArgumentError
            No N up to `most` reaches it; the message names the best error there. Or a setting that is chosen here:
            basis, contraction, samples.
        """
        for name in ("basis", "contraction", "samples"):
            if name in settings:
                raise ArgumentError(
                    name, "None given, for it is chosen here", repr(settings[name]), f"Leave {name} out."
                )
        length = checks.count("segment", segment)
        features = supposed_features(features, length)
        ridge = penalty(settings.pop("ridge", 1e-3))
        scheme, contraction = smallest_scheme(
            checks.count("tokens", tokens),
            checks.number("error", error, 0, 1),
            ridge,
            length,
            features,
            checks.count("most", most),
        )
        n, samples = len(scheme.basis), scheme.samples
        return cls(rows, dim, n, contraction, ridge, samples=samples, segment=length, **settings)  # type: ignore[call-arg]

    def report(self, segment: int | None = None, features: int | None = None) -> SignalReport:
        """What this memory can hold, segments of `segment` tokens with `features` each; see Signal.report.

        Raises
        ------
        ArgumentError
        """
        length = self._last_segment if segment is None else checks.count("segment", segment)
        return signal_report(self.scheme, length, self._signals.contraction_of(length), features)

    @shared
    def shown(self, t: Any, rows: Sequence[int] | None = None) -> np.ndarray:
        """Which token of its history a row shows at each place, by how many came before it.

        Parameters
        ----------
        t : array (T,), or plain numbers
            Places in [0, 1].
        rows : sequence of int, optional
            Which rows; all by default.

        Returns
        -------
        float64 array (rows, T)
            Ascending along t where t ascends; where it climbs steeply, many tokens share little room.

        Raises
        ------
        ArgumentError, NonFiniteError, DTypeError
        """
        chosen, t = listed(rows, self.rows), checks.plain("t", t)
        checks.shape("t", t, "T", whole=True)
        return self._signals.timeline.at(positions_in("t", t, t=t), chosen)
