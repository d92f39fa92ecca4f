"""The machine that the numbers are of."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """The model of its CPU, as far as the system tells."""
    try:
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text("utf-8"))[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
