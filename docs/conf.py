"""How Sphinx builds the documentation; `nox -s docs` runs it against the installed package."""

import runpy
from pathlib import Path
from typing import Any

import perdure

project = "perdure"
author = "The perdure developers"
version = release = perdure.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "numpydoc",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"perdure {release}"

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # numpydoc's sections tell types and shapes
numpydoc_show_class_members = False
default_role = "code"  # `x` in a docstring is code, as in Markdown

# The standard `>>>` examples of all pages and docstrings run, each page in a namespace of its own.
doctest_test_doctest_blocks = "default"
doctest_global_setup = "import numpy as np\nimport perdure"


def setup(app: Any) -> None:
    """Draw the pictures before the pages that show them are read."""
    script = runpy.run_path(str(Path(app.srcdir) / "examples" / "continuous_pictures.py"))
    app.connect("builder-inited", lambda app: script["draw"](Path(app.srcdir) / "generated"))
