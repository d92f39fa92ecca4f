"""Who computes: the order of choice, what travels and what comes back, and what is said when a backend cannot."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
import threading
import types
from contextlib import nullcontext
from pathlib import Path

import array_api_strict
import numpy as np
import pytest
import torch
from perdure.backends import KERNELS, current_backend, register, registry
from perdure.backends.arrays import common_framework, framework, namespace, optional_import

import perdure

TOY = Path(__file__).resolve().parents[1] / "docs" / "examples" / "toy_backend.py"
RNG = np.random.default_rng(0)
QUERIES, KEYS = RNG.standard_normal((2, 3, 4)), RNG.standard_normal((2, 9, 4))


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No choice made outside the test, and every backend a test registers forgotten afterwards."""
    monkeypatch.delenv("PERDURE_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_modules", dict(registry._modules))
    monkeypatch.setattr(registry, "_loaded", {})


@pytest.fixture
def spy():
    """A function that registers a backend under a name; its `seen` lists the dtypes of every call that reached it."""

    def make(name, **parts):
        module = types.ModuleType(name)
        module.seen = []

        def retrieve(queries, keys, *rest):
            module.seen.append((type(queries), str(queries.dtype), str(keys.dtype)))
            return NotImplemented

        vars(module).update({"retrieve": retrieve} | parts)
        register(name, module)
        return module

    return make


def search():
    return perdure.top_k(QUERIES, KEYS, k=2)


# ---- the order of choice --------------------------------------------------------------------------------------------


def test_default_is_numba():
    assert current_backend() == "numba"


def test_the_variable_beats_the_default_and_the_block_beats_the_variable(spy, monkeypatch):
    by_variable, by_block = spy("variable"), spy("block")
    monkeypatch.setenv("PERDURE_BACKEND", "variable")
    search()
    assert (len(by_variable.seen), len(by_block.seen)) == (1, 0)
    with perdure.backend("block") as module:
        assert module is by_block
        search()
    assert (len(by_variable.seen), len(by_block.seen)) == (1, 1)
    search()
    assert (len(by_variable.seen), len(by_block.seen)) == (2, 1)


def test_the_arrays_own_framework_beats_both(spy, monkeypatch):
    other = spy("other")
    monkeypatch.setenv("PERDURE_BACKEND", "other")
    with perdure.backend("other"):
        near = perdure.top_k(torch.from_numpy(QUERIES), torch.from_numpy(KEYS), k=2)
        strict = perdure.top_k(array_api_strict.asarray(QUERIES), array_api_strict.asarray(KEYS), k=2)
    assert other.seen == []
    assert isinstance(near.scores, torch.Tensor)
    assert namespace(strict.scores) is array_api_strict
    np.testing.assert_array_equal(near.positions.numpy(), np.asarray(strict.positions))


def test_an_empty_variable_is_no_choice(monkeypatch):
    monkeypatch.setenv("PERDURE_BACKEND", "")
    assert current_backend() == "numba"


def test_blocks_nest_and_an_exception_restores(spy):
    spy("inner")
    with perdure.backend("numpy"):
        with pytest.raises(ZeroDivisionError), perdure.backend("inner"):
            1 / 0  # noqa: B018
        assert current_backend() == "numpy"
        with pytest.raises(perdure.BackendError), perdure.backend("no such"):
            pass
        assert current_backend() == "numpy"
    assert current_backend() == "numba"


def test_a_block_counts_in_its_own_thread_only(spy):
    spy("left"), spy("right")
    inside, found = threading.Barrier(3), {}

    def work(name):
        with perdure.backend(name):
            inside.wait(timeout=30)
            found[name] = current_backend()
            inside.wait(timeout=30)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    inside.wait(timeout=30)
    found["main"] = current_backend()
    inside.wait(timeout=30)
    for thread in threads:
        thread.join(timeout=30)
    assert found == {"left": "left", "right": "right", "main": "numba"}


def test_the_variable_works_from_outside_the_process():
    code = "import sys, perdure, numpy as np; near = perdure.top_k(np.eye(2), np.eye(2), 1); "
    code += "print(near.positions.ravel().tolist(), type(near.scores).__name__, 'torch' in sys.modules)"
    path = str(Path(perdure.__file__).parents[1])
    for name, imports_torch in (("numpy", False), ("torch", True)):
        environment = {"PERDURE_BACKEND": name, "PYTHONPATH": path}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
        )
        assert result.stdout == f"[0, 1] ndarray {imports_torch}\n", result.stderr


# ---- names that cannot be had ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", ["block", "variable"])
def test_an_unknown_name_raises_with_the_known_ones(choose, monkeypatch):
    monkeypatch.setenv("PERDURE_BACKEND", "cuda" if choose == "variable" else "numpy")
    block = perdure.backend("cuda") if choose == "block" else nullcontext()
    with pytest.raises(perdure.BackendError, match=r"one of numpy, numba, torch, cupy, got 'cuda'") as caught, block:
        search()
    assert "PERDURE_BACKEND" in str(caught.value)


def test_an_unknown_name_is_refused_where_no_kernel_computes_too(monkeypatch):
    x, basis = RNG.standard_normal((9, 2)), perdure.gaussian_basis(4)
    signal = perdure.fit(x, basis)  # its operator is kept from here on
    monkeypatch.setenv("PERDURE_BACKEND", "fortran")
    for call in (
        lambda: perdure.fit(x, basis),
        lambda: perdure.fit(x, perdure.rectangular_basis(4)),
        lambda: signal.update(x),
        lambda: perdure.attend(QUERIES, KEYS, KEYS),
    ):
        with pytest.raises(perdure.BackendError, match="'fortran'"):
            call()


@pytest.mark.parametrize("name", [None, 3, ("numpy",), np])
def test_a_name_must_be_a_string(name):
    with pytest.raises(perdure.ArgumentError, match="backend: expected a name"), perdure.backend(name):
        pass


def test_an_unusable_backend_raises_at_once_and_never_falls_back(spy, monkeypatch):
    def probe():
        raise perdure.BackendError("broken", "a device", "none", "Plug it in.")

    broken = spy("broken", probe=probe)
    with pytest.raises(perdure.BackendError, match="Plug it in"), perdure.backend("broken"):
        pass
    monkeypatch.setenv("PERDURE_BACKEND", "broken")
    with pytest.raises(perdure.BackendError, match="Plug it in"):
        search()
    assert broken.seen == []
    assert "broken" not in perdure.available_backends()
    assert "Plug it in" in perdure.available_backends().unusable["broken"]


def test_a_backend_that_cannot_be_imported_is_named():
    register("gone", "no_such_module_of_anyones")
    with pytest.raises(perdure.BackendError, match=r"gone: .*no_such_module_of_anyones"), perdure.backend("gone"):
        pass
    assert "no_such_module_of_anyones" in perdure.available_backends().unusable["gone"]


def test_available_backends_are_usable_and_the_others_have_reasons():
    backends = perdure.available_backends()
    assert {"numpy", "numba", "torch"} <= set(backends)
    assert set(backends) | set(backends.unusable) == {"numpy", "numba", "torch", "cupy"}
    for name in backends:
        with perdure.backend(name):
            assert search().positions.shape == (2, 3, 2)
    text = repr(backends)
    assert "numba: usable" in text
    assert all(f"{name}: not usable: {reason}" in text for name, reason in backends.unusable.items())


def test_cupy_computes_or_says_why_not(monkeypatch):
    """With a GPU NumPy goes in and comes out; without one, the error says what is missing and what to do."""
    monkeypatch.setenv("PERDURE_BACKEND", "cupy")
    if "cupy" in perdure.available_backends():
        assert isinstance(search().scores, np.ndarray)
        return
    with pytest.raises(perdure.BackendError) as caught:
        search()
    assert 'pip install "perdure[cupy]"' in str(caught.value) or "nvidia-smi" in str(caught.value)


def test_cupy_without_a_driver_is_an_error_that_names_the_driver(monkeypatch):
    """CuPy imports on machines without a GPU; only computing tells."""

    def ones(size):
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ones=ones, ndarray=type("ndarray", (), {})))
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", types.ModuleType("array_api_compat.cupy"))
    message = r"cupy: .*cudaErrorInsufficientDriver.*nvidia-smi"
    with pytest.raises(perdure.BackendError, match=message), perdure.backend("cupy"):
        pass


def test_a_broken_installation_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(perdure.BackendError, match=r"libfoo.*perdure\[extra\]") as caught:
        optional_import("broken_package", extra="extra")
    assert not isinstance(caught.value, perdure.MissingPackageError)
    with pytest.raises(perdure.MissingPackageError, match=r'missing-package: .*pip install "perdure\[extra\]"'):
        optional_import("missing_package", extra="extra")


# ---- what travels and what comes back -------------------------------------------------------------------------------


def views(array):
    """The same numbers read-only, backwards in memory, strided, in Fortran order, and in float16."""
    locked = array.copy()
    locked.flags.writeable = False
    return [locked, array[..., ::-1].copy()[..., ::-1], np.repeat(array, 2, -1)[..., ::2], np.asfortranarray(array)]


@pytest.mark.parametrize("index", range(4), ids=["read-only", "reversed", "strided", "fortran"])
def test_numpy_goes_into_torch_and_comes_back(index):
    queries, keys = views(QUERIES)[index], views(KEYS)[index]
    with perdure.backend("torch"):
        near = perdure.top_k(queries, keys, k=3)
        reading = perdure.attend(queries, keys, keys, near.positions)
        dense = perdure.attend(queries, keys, keys)
    with perdure.backend("numpy"):
        expected = perdure.top_k(QUERIES, KEYS, k=3)
        expected_dense = perdure.attend(QUERIES, KEYS, KEYS)
    for array in (near.scores, near.positions, reading.output, reading.lse, dense.output, dense.lse):
        assert type(array) is np.ndarray
    np.testing.assert_allclose(dense.output, expected_dense.output, rtol=0, atol=1e-12)
    np.testing.assert_allclose(dense.lse, expected_dense.lse, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(near.positions, expected.positions)
    np.testing.assert_allclose(near.scores, expected.scores, rtol=1e-12)


def test_half_precision_is_computed_in_float32_and_given_back_in_half(spy):
    module = spy("wide")
    with perdure.backend("wide"):
        near = perdure.top_k(QUERIES.astype(np.float16), KEYS.astype(np.float16), k=2)
        reading = perdure.attend(*(a.astype(np.float16) for a in (QUERIES, KEYS, KEYS)))
    assert module.seen == [(np.ndarray, "float32", "float32")]
    assert (near.scores.dtype, near.positions.dtype) == (np.float16, np.int64)
    assert (reading.output.dtype, reading.lse.dtype) == (np.float16, np.float32)


def test_bfloat16_tensors_come_back_as_bfloat16():
    half = torch.from_numpy(QUERIES).bfloat16()
    reading = perdure.attend(half, half, half)
    assert (reading.output.dtype, reading.lse.dtype) == (torch.bfloat16, torch.float32)


def test_mixed_frameworks_raise_and_name_a_conversion_that_works():
    tensor = torch.from_numpy(KEYS)
    with pytest.raises(perdure.FrameworkError, match=r"np\.asarray\(keys\.cpu\(\)\)"):
        perdure.top_k(QUERIES, tensor, k=1)
    with pytest.raises(perdure.FrameworkError, match=r"torch\.as_tensor\(keys\)"):
        perdure.top_k(torch.from_numpy(QUERIES), KEYS, k=1)
    with pytest.raises(perdure.FrameworkError, match="one of array-api"):
        perdure.top_k(QUERIES, array_api_strict.asarray(KEYS), k=1)
    near = perdure.top_k(QUERIES, np.asarray(tensor.cpu()), k=1)
    np.testing.assert_array_equal(near.positions, perdure.top_k(torch.as_tensor(QUERIES), tensor, k=1).positions)


def test_two_devices_raise():
    with pytest.raises(perdure.FrameworkError, match=r"keys: expected an array on cpu.*meta"):
        perdure.top_k(torch.zeros(1, 2), torch.zeros(3, 2, device="meta"), k=1)


@pytest.mark.parametrize("thing", [[[1.0]], 1.0, None, np.float64(1), "text"], ids=repr)
def test_what_is_no_array_raises(thing):
    with pytest.raises(perdure.FrameworkError, match=r"keys: expected an array of NumPy, PyTorch or CuPy"):
        perdure.top_k(QUERIES, thing, k=1)


@pytest.mark.parametrize(
    ("thing", "received"),
    [
        (np.ma.masked_greater(KEYS, 1.0), "MaskedArray"),
        (KEYS[0].view(np.matrix), "matrix"),
        (torch.from_numpy(KEYS).to_sparse(), "sparse_coo"),
    ],
)
def test_an_array_that_would_be_misread_is_named(thing, received):
    queries = QUERIES if isinstance(thing, np.ndarray) else torch.from_numpy(QUERIES)
    with pytest.raises(perdure.FrameworkError, match=rf"keys: expected a .*{received}"):
        perdure.top_k(queries, thing, k=1)


def test_numbers_of_8_bits_are_no_floats_to_compute_with():
    eighth = torch.ones(3, 4).to(torch.float8_e4m3fn)
    with pytest.raises(perdure.DTypeError, match=r"queries: .*float8_e4m3fn"):
        perdure.top_k(eighth, eighth, k=1)


def test_framework_knows_each_and_imports_none():
    assert framework(QUERIES) == "numpy"
    assert framework(torch.zeros(1)) == "torch"
    assert framework(array_api_strict.asarray(1.0)) == "array-api"
    assert framework(np.float64(1)) is framework([1.0]) is framework(None) is None
    assert common_framework(a=QUERIES, b=None, c=KEYS) == "numpy"


# ---- adding one -----------------------------------------------------------------------------------------------------


def test_the_documented_toy_backend_computes_what_it_offers(monkeypatch):
    spec = importlib.util.spec_from_file_location("toy_backend", TOY)
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    calls = []
    twin = toy.gated
    monkeypatch.setattr(toy, "gated", lambda *args: calls.append(twin(*args)) or calls[-1])
    register("toy", toy)

    memory, local = RNG.standard_normal((2, 2, 3, 5))
    bias = np.array([-1.0, 2.0])
    expected = perdure.gate(memory, local, bias)
    with perdure.backend("toy"):
        mixed = perdure.gate(memory, local, bias)
        assert calls[-1] is mixed
        reading = perdure.Reading(memory, np.array([[0.0, -np.inf, 1.0], [0.0, 0.0, 0.0]]))
        unchanged = perdure.gate(reading, local, bias)
        assert calls[-1] is NotImplemented
        near = search()  # a kernel it does not offer at all
    np.testing.assert_allclose(mixed, expected, rtol=1e-12)
    np.testing.assert_array_equal(unchanged[0, 1], local[0, 1])
    np.testing.assert_array_equal(near.positions, search().positions)


def test_the_documented_way_to_add_one_works_from_the_start():
    """The very lines of the documentation, in an interpreter that has loaded nothing else."""
    text = (TOY.parents[1] / "backends.rst").read_text("utf-8")
    lines = text.split(".. code-block:: python\n\n")[1].split("\nWhat a backend")[0]
    given = "import numpy as np\nmemory_output = local_output = np.ones((2, 3, 4)); bias = np.zeros(2)\n"
    check = "\nassert mixed.shape == (2, 3, 4)\nassert perdure.core.attention.gated.formula is not None"
    path = os.pathsep.join([str(TOY.parent), str(Path(perdure.__file__).parents[1])])
    code = given + textwrap.dedent(lines) + check
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path}, timeout=120)


def test_a_backend_registered_anew_replaces_the_old(spy):
    first = spy("again")
    with perdure.backend("again"):
        search()
    second = spy("again")
    with perdure.backend("again"):
        search()
    assert (len(first.seen), len(second.seen)) == (1, 1)


@pytest.mark.parametrize("name", ["numba", "torch"])
def test_twins_are_functions_with_their_kernels_arguments(name):
    for public in perdure.__all__:
        getattr(perdure, public)  # now every module with kernels is imported
    module = registry.load(name)
    twins = {kernel: getattr(module, kernel) for kernel in KERNELS if hasattr(module, kernel)}
    assert {"retrieve", "attention"} <= set(twins)
    for kernel, twin in twins.items():
        assert inspect.isfunction(twin), f"{name}.{kernel} is {twin!r}"
        wanted = list(inspect.signature(KERNELS[kernel].formula).parameters)
        assert list(inspect.signature(twin).parameters) in (wanted, ["args"])
    if name == "numba":
        assert {public for public in module.__all__ if public.islower()} == set(twins)
