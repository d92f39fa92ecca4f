"""The promises, with the fast counts; and that each check has teeth: a store that breaks the promise fails it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import perdure
from reliability.__main__ import CHECKS, PRELOADED

TESTS = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the checks kill forked processes"),
]


def run(check, count, seed=0, under="durable"):
    """What `python -m reliability` says, in a process of its own."""
    home = str(Path(perdure.__file__).parents[1])
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = [check, "--count", str(count), "--seed", str(seed), "--under", under]
    return subprocess.run(
        [sys.executable, "-m", "reliability", *arguments],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("check", CHECKS)
def test_the_promise_holds(check):
    done = run(check, CHECKS[check][1])
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    if check in PRELOADED and "not run" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert json.loads(done.stdout)["check"] == check


@pytest.mark.parametrize(
    ("check", "count", "under", "because"),
    [
        ("kill", 60, "naive", "BadZipFile|not the state after|EOFError|KeyError"),
        ("inject", 60, "naive", "an error of somebody else|BadZipFile|not a state"),
        ("trace", 10, "forgetful", "but not flushed"),
        ("mutate_files", 300, "trusting", "not noticed"),
        ("mutate_stores", 200, "trusting", "not noticed"),
        ("hostile", 1, "obliging", "accepted"),
        ("readers", 300, "trusting", "is not as any commit|are not the names|every record|records that match"),
        ("isolation", 300, "leaky", "is not what was written|another's token"),
        # what is freed beside a reader may also take the whole process along
        ("threads", 5, "unlocked", "another token's|half|before|left|score|double free|corrupt|invalid|Segmentation"),
        ("soak", 1, "hoarding", "times the live bytes"),
    ],
)
def test_a_store_that_breaks_the_promise_is_caught(check, count, under, because):
    done = run(check, count, seed=1, under=under)
    if "not run" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode != 0, f"{under} passed {check}: {done.stdout}"
    assert any(word in done.stderr + done.stdout for word in because.split("|")), done.stderr
