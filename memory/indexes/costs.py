"""What retrieval costs on this machine: measured once, by searching, training and building a little, and then kept.

Where from, in this order: the argument `costs`; the file that the environment variable PERDURE_COSTS names; the user's
cache folder. A file that is missing is written after the measurement, which takes about a second.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ...backends.errors import ArgumentError
from ...backends.registry import current_backend
from ...core import checks
from .exact import ExactIndex
from .hnsw import HNSWIndex
from .ivf import IVFIndex
from .protocol import Held

VARIABLE = "PERDURE_COSTS"
WALK = 64  # keys compared in a graph for each doubling of its size, at beam 64
KEYS, DIM, MANY, GRAPH = 1 << 15, 64, 128, 1024  # what is measured: keys, components, queries, keys of a graph


@dataclass(frozen=True)
class Costs:
    """What the parts of a step cost. All but the first two are in units of the first.

    Attributes
    ----------
    scanned : float
        Nanoseconds a component of a key that exact search compares with one of many queries.
    probed : float
        Share of the lists that a recall of 0.95 takes: a guess until audits of the memory's own queries replace it.
    few : float
        Factor on searches of one query, which waits for the memory.
    lists : float
        Factor on keys that are searched in lists.
    trained : float
        Of training and filling lists, a token, for every list.
    walked, built : float
        A key compared in a graph; a token's share in building one, for every doubling of its size.
    source : str
        Where the numbers come from.
    """

    scanned: float = 0.025
    probed: float = 0.12
    few: float = 3.0
    lists: float = 2.0
    trained: float = 12.0
    walked: float = 90.0
    built: float = 4000.0
    source: str = "given"

    def constants(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "source"}

    @classmethod
    def given(cls, constants: Any, source: str = "given") -> Costs:
        """Costs of these constants; those that are not named keep their defaults.

        Raises
        ------
        ArgumentError
            Not a mapping of known names to numbers above 0.
        """
        known = [field.name for field in fields(cls) if field.name != "source"]
        if not isinstance(constants, Mapping) or not set(constants) <= set(known):
            raise ArgumentError("costs", f"a mapping of {', '.join(known)}", repr(constants)[:200], "Leave it out.")
        return cls(**{name: checks.positive(f"costs[{name!r}]", x) for name, x in constants.items()}, source=source)


@functools.cache
def machine_costs() -> Costs:
    """This machine's, read where they are kept, else measured and kept there.

    Raises
    ------
    ArgumentError
        The file that PERDURE_COSTS names holds something else.
    """
    named = os.environ.get(VARIABLE)
    place = Path(named) if named else cache_folder() / f"costs-{fingerprint()}.json"
    try:
        return Costs.given(json.loads(place.read_text("utf-8")), f"from {place}")
    except (OSError, ValueError) as error:  # ArgumentError and JSON errors are ValueErrors
        if named and place.exists():
            raise ArgumentError(VARIABLE, "a JSON file of costs", str(error), f"Delete {place}.") from error
    costs = measured()
    keep(costs, place)
    return costs


def cache_folder() -> Path:
    """Where the user's programs keep what they can compute again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "perdure"


def fingerprint() -> str:
    """What the costs depend on: the machine, the backend and whether graphs can be built."""
    graphs = "graphs" if importlib.util.find_spec("hnswlib") else "no-graphs"
    return "-".join((platform.machine() or "any", platform.node() or "here", current_backend(), graphs))


def keep(costs: Costs, place: Path) -> None:
    """Write a file whole or not at all; where nothing can be written, the next process measures again."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(costs.constants(), file, indent=1)
        os.replace(name, place)
    except OSError:
        return


def measured() -> Costs:
    """Costs as this process meets them, on normal numbers."""
    rng = np.random.default_rng(0)
    row = Held(rng.standard_normal((1, KEYS, DIM), dtype=np.float32))
    many = rng.standard_normal((1, MANY, DIM), dtype=np.float32)
    dtype = np.dtype(np.float32)
    exact = ExactIndex(1, DIM, "ip", dtype)
    scanned = seconds(lambda: exact.search(row, many, 32)) / (MANY * KEYS * DIM)
    few = seconds(lambda: exact.search(row, many[:, :1], 32)) / (KEYS * DIM) / scanned
    lists = IVFIndex(1, DIM, "ip", dtype, 0.95, 0)
    training = seconds(lambda: lists.retrain(row), once=True)
    count, unit = lists.centroids.shape[1], DIM * scanned
    lists.probing.probes = max(count // 8, 1)
    lists.follow(row)
    best = lists.best_lists(many, lists.probes)
    listed = seconds(lambda: lists.search_lists(row, many, 32, best)) / (best.size * KEYS / count) / unit
    costs = {
        "scanned": 1e9 * scanned,
        "few": max(few, 1.0),
        "lists": listed,
        "trained": 2 * training / KEYS / unit / count,  # lists are trained twice in a turnover
        **(measured_graph(row, many, unit) if importlib.util.find_spec("hnswlib") else {}),
    }
    return Costs(**costs, source="measured on this machine")


def measured_graph(row: Held, many: np.ndarray, unit: float) -> dict[str, float]:
    """What graphs cost, in units of a component's comparison."""
    graphs = HNSWIndex(1, DIM, "ip", GRAPH, 0.95, 0)
    keys, doublings = row.keys[0, :GRAPH], math.log2(GRAPH + 2)
    building = seconds(lambda: graphs.build(keys, np.arange(GRAPH)), once=True)
    graph = graphs.build(keys, np.arange(GRAPH))
    asking = seconds(lambda: graphs.ask(graph, many[0], 32, 64))
    compared = MANY * min(WALK * doublings, GRAPH)
    return {"walked": asking / compared / unit, "built": building / (GRAPH * doublings) / unit}


def seconds(work: Callable[[], Any], once: bool = False) -> float:
    """The shortest of some runs, after one that compiles; or of one."""
    times = []
    for _ in range(1 if once else 4):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[-3:])
