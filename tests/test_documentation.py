"""Every example in the README, the documentation and the docstrings does what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import perdure

ROOT = Path(__file__).resolve().parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
PAGES = sorted((ROOT / "docs").glob("*.rst"))


def modules() -> list[str]:
    """Names of all modules with examples in their docstrings."""
    paths = [p for floor in ("backends", "core", "memory", "bindings") for p in (ROOT / floor).rglob("*.py")]
    paths = [p for p in paths if ">>> " in p.read_text("utf-8")]
    return sorted(".".join(("perdure", *p.relative_to(ROOT).with_suffix("").parts)) for p in paths)


def assert_passes(test: doctest.DocTest) -> int:
    """Run the examples of one text; how many there were."""
    told: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=told.append)
    assert told == [], "".join(told)
    return len(test.examples)


def test_readme():
    blocks = re.findall(r"^```pycon\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "README.md", "README.md", 0)
    assert assert_passes(test) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page):
    names = {"np": np, "perdure": perdure}
    assert_passes(doctest.DocTestParser().get_doctest(page.read_text("utf-8"), names, page.name, str(page), 0))


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    assert sum(assert_passes(test) for test in tests) > 0


def test_every_public_name_has_its_place_in_the_api():
    listed = re.findall(r"^   ([\w.]+)$", (ROOT / "docs" / "api.rst").read_text("utf-8"), re.M)
    assert {name for name in listed if "." not in name} == set(perdure.__all__)
    assert len(listed) == len(set(listed))


def test_every_variable_that_is_read_is_in_the_table():
    table = (ROOT / "docs" / "environment.rst").read_text("utf-8")
    read = set()
    for floor in ("backends", "core", "memory", "bindings", "src"):
        for path in (ROOT / floor).rglob("*.py"):
            texts = (n.value for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Constant))
            read |= {text for text in texts if isinstance(text, str) and re.fullmatch(r"PERDURE_\w+", text)}
    assert "PERDURE_BACKEND" in read
    assert [name for name in sorted(read) if f"`{name}`" not in table] == []
