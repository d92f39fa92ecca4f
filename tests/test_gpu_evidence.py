"""What is said about GPUs agrees with the evidence there is, and the evidence is about the sources as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import perdure.backends.cuda.texts
import pytest
from perdure.backends.cuda import fingerprint, sources

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "benchmarks" / "results" / "gpu-evidence.json"
PAGES = ("README.md", "docs/gpu.rst")
NEVER = "The CUDA kernels have never run on a GPU yet; they are compile-checked and host-checked only."
STALE = "The CUDA sources have changed since they last ran on a GPU: the evidence is stale."
VERIFIED = "The CUDA kernels were last verified on {device}, at commit {commit}."


def claims(evidence, sources):
    """What has to be said: of no run, of a run of these very sources that passed, or of one of others."""
    if evidence is None:
        return [NEVER]
    counts = evidence["tests"]
    if not counts["passed"] or counts["failures"] or counts["errors"] or counts["skipped"]:
        return [NEVER]  # a run that failed verifies nothing
    last = VERIFIED.format(**evidence)
    return [last] if evidence["sources"] == sources else [last, STALE]


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_what_was_verified(page):
    evidence = json.loads(EVIDENCE.read_text("utf-8")) if EVIDENCE.exists() else None
    text, said = " ".join((ROOT / page).read_text("utf-8").split()), claims(evidence, fingerprint())
    assert [claim for claim in said if claim not in text] == []
    assert [claim for claim in (NEVER, STALE) if claim in text and claim not in said] == []
    assert ("last verified on" in text) == (VERIFIED.split("{")[0] in said[0])


def test_what_has_to_be_said_follows_from_the_evidence():
    counts = {"passed": 9, "failures": 0, "errors": 0, "skipped": 0}
    evidence = {"device": "a GPU", "commit": "abc", "sources": "x", "tests": counts}
    assert claims(None, "x") == [NEVER]
    assert claims(evidence, "x") == ["The CUDA kernels were last verified on a GPU, at commit abc."]
    assert claims(evidence, "y")[1:] == [STALE]
    for failed in ({"failures": 1}, {"errors": 1}, {"skipped": 1}, {"passed": 0}):
        assert claims({**evidence, "tests": {**counts, **failed}}, "x") == [NEVER]


def test_the_fingerprint_is_that_of_every_source(monkeypatch):
    before, read = fingerprint(), perdure.backends.cuda.texts.source
    for name in sources():
        monkeypatch.setattr("perdure.backends.cuda.texts.source", lambda n, name=name: read(n) + " " * (n == name))
        assert fingerprint() != before


def test_the_program_that_writes_it_runs():
    """Small and on the CPU: what it calls is there, and takes what it is given."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("'what'") == 8
