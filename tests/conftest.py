"""Fixtures and settings that every test shares."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import `strategies` under any import mode

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("brief", deadline=None, max_examples=10)
settings.load_profile("default")


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` are for `nox -s gpu` alone; there, a GPU that is missing is a failure."""
    if "gpu" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture
def rng():
    return np.random.default_rng(0)
