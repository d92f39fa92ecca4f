"""The limit that threadpoolctl sets on threads holds for those of this package too: it is told of them as of a pool.

threadpoolctl finds pools by the shared libraries that are loaded, so that a pool written in Python needs one to stand
for it: NumPy's, which is always there. Nothing is asked when work begins; what was set is remembered.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_most: int | None = None  # as it was set last; None where nothing was


def most(threads: int) -> int:
    """How many of `threads` may work at once."""
    return threads if _most is None else min(threads, _most)


def register() -> None:
    """Make the threads known to threadpoolctl, if it is installed: limits that begin from now on are heeded."""
    try:
        import threadpoolctl
    except ImportError:
        return
    if not hasattr(threadpoolctl, "register"):  # before 3.2 it cannot be told
        return

    class Threads(threadpoolctl.LibController):
        user_api = internal_api = "perdure"
        filename_prefixes = ("_multiarray_umath",)

        def get_num_threads(self) -> int:
            numba = sys.modules.get("numba.core.config")
            return most(getattr(numba, "NUMBA_NUM_THREADS", 0) or os.cpu_count() or 1)

        def set_num_threads(self, num_threads: Any) -> None:
            global _most
            _most = max(int(num_threads), 1)

        def get_version(self) -> None:
            return None

    threadpoolctl.register(Threads)


register()
