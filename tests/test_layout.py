"""The house: what is installed, who imports whom, what is public, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import perdure

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("backends", "core", "memory", "bindings")  # from the ground up: each may import from those before it
FRAMEWORKS = {"torch", "cupy", "transformers", "jax"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

PUBLIC = [
    "ArgumentError",
    "BackendError",
    "Basis",
    "CompressiveMemory",
    "ContinuousMemory",
    "DTypeError",
    "DeviceMemoryError",
    "FileError",
    "ForkError",
    "FrameworkError",
    "HybridMemory",
    "KNNMemory",
    "MissingPackageError",
    "Neighbours",
    "NonFiniteError",
    "PerdureError",
    "QuotaError",
    "Reading",
    "RecallError",
    "RecallWarning",
    "RecurrentMemory",
    "ShapeError",
    "Signal",
    "SignalReport",
    "States",
    "Store",
    "StoreError",
    "StoredMemory",
    "attend",
    "available_backends",
    "backend",
    "compress",
    "expected_value",
    "fit",
    "gate",
    "gaussian_basis",
    "gibbs_mass",
    "gibbs_value",
    "load",
    "mass",
    "merge",
    "open",
    "rectangular_basis",
    "save",
    "top_k",
]


def files(folder: Path, suffixes: tuple[str, ...] = (".py", ".typed", ".cu", ".cuh")) -> dict[str, bytes]:
    """Contents of the files in `folder` by relative name; links are followed."""
    found = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        paths = (Path(place, name) for name in names if name.endswith(suffixes))
        found |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return found


def modules(*floors: str) -> list[Path]:
    return sorted(path for floor in floors for path in (ROOT / floor).rglob("*.py"))


PUBLIC_BINDINGS = {
    "cupy": ["continuous_attention", "memorizing_attention"],
    "distributed": ["gather", "split"],
    "plot": ["attention", "error", "retained", "signal"],
    "torch": [
        "CompressiveAttention",
        "CompressiveState",
        "ContinuousAttention",
        "ContinuousState",
        "KNNState",
        "MemorizingAttention",
        "MemoryScope",
        "MemoryTransformer",
        "RecurrentState",
        "SegmentedAttention",
        "State",
        "TransformerXLAttention",
    ],
    "transformers": ["Explanation", "ModelMemory", "Trace", "attach", "detach"],
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds the same perdure as this one."""
    path = os.pathsep.join([str(Path(perdure.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in os.environ.items() if k != "PERDURE_BACKEND"} | {"PYTHONPATH": path} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


# ---- what is installed ----------------------------------------------------------------------------------------------


def test_the_installed_package_is_the_repository():
    source = files(ROOT / "src" / "perdure")
    for floor in FLOORS:
        source |= {f"{floor}/{name}": content for name, content in files(ROOT / floor).items()}
    installed = files(Path(perdure.__file__).parent)
    assert sorted(installed) == sorted(source)
    assert [name for name in source if installed[name] != source[name]] == []
    assert "py.typed" in installed


def test_every_folder_of_modules_is_a_listed_package():
    folders = {path.parent for path in modules(*FLOORS)}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    expected = {"perdure"} | {f"perdure.{name_of(folder).replace('/', '.')}" for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_the_command_line_entry_point_exists():
    module, _, function = PROJECT["project"]["scripts"]["perdure"].partition(":")
    source = ast.parse((ROOT / "src" / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    assert function in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}


def test_the_version_is_told_once_and_cited_alike():
    assert "version" in PROJECT["project"]["dynamic"]
    assert f"\nversion: {perdure.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(rf"^## \[{re.escape(perdure.__version__)}\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)


def test_every_direct_dependency_is_pinned():
    project = PROJECT["project"]
    named = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    named += [line for extra in project["optional-dependencies"].values() for line in extra]
    named += [line for group in PROJECT["dependency-groups"].values() for line in group if isinstance(line, str)]
    names = {re.match(r"[A-Za-z0-9-]+", line)[0] for line in named}
    pins = re.findall(r"^([a-z0-9-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert len(pins) == len(set(pins))
    assert names - {"perdure", "nox", "cupy-cuda12x", "cupy-cuda13x"} - set(pins) == set()


# ---- who imports whom -----------------------------------------------------------------------------------------------


def imports(path: Path) -> list[str]:
    """Absolute names of all that a module imports anywhere, inside functions too; relative ones under `perdure`."""
    package = ["perdure", *path.relative_to(ROOT).parent.parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            names += [f"{stem}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", modules(*FLOORS), ids=name_of)
def test_imports_only_go_down(path):
    own = FLOORS.index(path.relative_to(ROOT).parts[0])
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "perdure":
            assert parts[1] in FLOORS[: own + 1], f"{name_of(path)} imports {name}, which is above it"


@pytest.mark.parametrize("path", modules(*FLOORS), ids=name_of)
def test_inside_the_floors_imports_are_relative(path):
    tree = ast.parse(path.read_text("utf-8"))
    absolute = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    absolute += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert [name for name in absolute if name.split(".")[0] == "perdure"] == []


@pytest.mark.parametrize("path", modules("core", "memory"), ids=name_of)
def test_core_and_memory_name_no_framework(path):
    assert {name.split(".")[0] for name in imports(path)} & FRAMEWORKS == set()


# ---- what is public -------------------------------------------------------------------------------------------------


def test_public_names_are_these():
    assert perdure.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(perdure))


@pytest.mark.parametrize("module", PUBLIC_BINDINGS)
def test_public_names_of_bindings_are_these(module):
    assert importlib.import_module(f"perdure.bindings.{module}").__all__ == PUBLIC_BINDINGS[module]


def test_an_unknown_name_raises_and_lists_the_known():
    with pytest.raises(AttributeError, match=r"no attribute 'topk'.*top_k"):
        perdure.topk  # noqa: B018


def public_callables():
    """(name, object) of everything public that can be called, and the public methods that perdure gives its classes."""
    bindings = {name: importlib.import_module(f"perdure.bindings.{name}") for name in PUBLIC_BINDINGS}
    for module, name in [(perdure, n) for n in perdure.__all__] + [
        (m, n) for m in bindings.values() for n in m.__all__
    ]:
        thing = getattr(module, name)
        yield name, thing
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            methods = inspect.getmembers(thing, lambda m: callable(m) or isinstance(m, property))
            ours = [(m, method) for m, method in methods if not m.startswith("_") and of_perdure(method)]
            yield from ((f"{name}.{m}", method) for m, method in ours)


def of_perdure(method) -> bool:
    """Whether it is defined here, not inherited from a framework's class."""
    return (getattr(method, "__module__", None) or method.fget.__module__).startswith("perdure")


def documented_parameters(text: str) -> dict[str, str]:
    """What a numpydoc docstring says the type of each parameter is."""
    section = re.search(r"\nParameters\n-+\n(.*?)(?=\n\n\w[^\n]*\n---|\Z)", text, re.S)
    lines = re.findall(r"^(\w[\w, *]*?) : (.*)$", section[1] if section else "", re.M)
    return {name.strip(" *"): kind for names, kind in lines for name in names.split(",")}


def test_everything_public_is_documented_with_shapes():
    missing = []
    for name, thing in public_callables():
        text = inspect.getdoc(thing) or ""
        first = text.partition("\n")[0]
        if not first or first[-1] not in ".:" or text.startswith(f"{name}("):  # the last: made by @dataclass
            missing.append(f"{name}: no line of its own")
        for parameter, kind in documented_parameters(text).items():
            if "array" in kind and "(" not in kind:
                missing.append(f"{name}: no shape of {parameter}")
    assert missing == []


def test_every_argument_of_a_public_function_is_documented():
    missing = []
    for name, thing in public_callables():
        if isinstance(thing, property) or (inspect.isclass(thing) and not hasattr(thing, "write")):
            continue
        arguments = [p for p in inspect.signature(thing).parameters if p not in ("self", "cls")]
        text = inspect.getdoc(thing) or ""
        documented = documented_parameters(text).keys() | set(re.findall(r"(?:`|\*)(\w+)", text))
        missing += [f"{name}: {a}" for a in arguments if a not in documented]
    assert missing == []


@pytest.mark.parametrize("path", [*modules(*FLOORS), *(ROOT / "src" / "perdure").glob("*.py")], ids=name_of)
def test_every_module_and_its_public_parts_say_what_they_are(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree)
    if "backends" in path.parts:
        return  # twins are documented by the kernel they accelerate
    parts = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    assert [part.name for part in parts if not ast.get_docstring(part)] == []


# ---- what an import costs -------------------------------------------------------------------------------------------

HEAVY = ["torch", "cupy", "transformers", "numba", "scipy", "matplotlib", "hnswlib", "array_api_compat"]


def test_importing_perdure_imports_nothing_heavy_and_costs_little():
    code = f"""
import sys, time
before = time.process_time()
import perdure
cost = time.process_time() - before
print(sorted(set({HEAVY}) & set(sys.modules)), cost)
"""
    outputs = [run(code) for _ in range(3)]
    assert [o.stderr for o in outputs] == ["", "", ""]
    assert {o.stdout.rpartition(" ")[0] for o in outputs} == {"[]"}
    assert min(float(o.stdout.rpartition(" ")[2]) for o in outputs) < 0.5


def test_numpy_arrays_import_no_other_framework():
    code = """
import sys, numpy as np, perdure
memory = perdure.KNNMemory(rows=1, heads=1, dim=4, capacity=8)
keys = np.eye(4)[None, None]
memory.write(keys, keys)
memory.read(keys, k=2)
print(sorted({"torch", "cupy", "transformers", "array_api_compat"} & set(sys.modules)))
"""
    result = run(code)
    assert (result.stdout, result.stderr) == ("[]\n", "")


BLOCKED = """
import sys
for name in {packages}:
    sys.modules[name] = None  # importing it now fails as if it were not installed
import numpy as np, perdure
try:
    with perdure.backend("{backend}"):
        pass
except perdure.MissingPackageError as error:
    print(error)
print(perdure.available_backends().unusable["{backend}"])
"""


@pytest.mark.parametrize(
    ("backend", "packages"),
    [("torch", ["torch"]), ("torch", ["array_api_compat", "array_api_compat.torch"]), ("cupy", ["cupy"])],
)
def test_a_missing_extra_is_named_with_its_install_line(backend, packages):
    result = run(BLOCKED.format(packages=packages, backend=backend))
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(packages[0].replace("_", "-"))
        assert f'pip install "perdure[{backend}]"' in line


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_demo_names_a_missing_extra_in_one_line(package):
    result = run(
        f"import sys; sys.modules['{package}'] = None; from perdure.__main__ import main; sys.exit(main(['demo']))"
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert 'pip install "perdure[transformers]"' in result.stderr
