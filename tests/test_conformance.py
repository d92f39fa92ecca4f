"""Every kernel on every backend computes what its formula computes in float64.

One test for all: a kernel joins by having a strategy `args_<kernel>`, a backend by being usable here. The framework,
device and dtype of the inputs come back, the inputs stay as they were, and every element of a result is written: the
memory that results are built in is filled with NaN first.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import array_api_strict
import cuda_host
import numpy as np
import perdure.core.attention
import perdure.core.density
import perdure.core.positions
import perdure.core.retrieval
import perdure.core.stored
import pytest
import strategies
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from perdure.backends import KERNELS
from perdure.backends.arrays import computing_dtype, framework, is_floating

import perdure

# rounding of the result's dtype, with room for a sum of a few hundred terms in the computing dtype
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 3e-5, "float64": 1e-10}


@dataclass(frozen=True)
class Run:
    """Arrays of one framework, computed by one backend."""

    framework: str
    backend: str  # who computes NumPy's arrays
    dtypes: tuple[str, ...]
    autograd: bool = False
    device: str = "cpu"  # of PyTorch's tensors


HALVES, FLOATS = ("float16", "bfloat16"), ("float32", "float64")
RUNS = {
    "numpy": Run("numpy", "numpy", ("float16", *FLOATS)),
    "numba": Run("numpy", "numba", ("float16", *FLOATS)),
    "torch": Run("torch", "numba", (*HALVES, *FLOATS)),
    "torch-autograd": Run("torch", "numba", ("bfloat16", *FLOATS), autograd=True),
    "array-api-strict": Run("array-api", "numpy", FLOATS),
    "cuda-on-host": Run("numpy", "cuda-on-host", FLOATS),  # CUDA sources run on the CPU: their logic, not a GPU
    # every other backend there is on this machine computes NumPy's arrays, CuPy on a GPU among them
    **{
        f"numpy-on-{name}": Run("numpy", name, ("float16", *FLOATS))
        for name in perdure.available_backends()
        if name not in ("numpy", "numba")
    },
}
ON_GPU = {
    "cupy": Run("cupy", "numba", ("float16", *FLOATS)),
    "torch-cuda": Run("torch", "numba", (*HALVES, *FLOATS), device="cuda"),
    "torch-cuda-autograd": Run("torch", "numba", ("bfloat16", *FLOATS), autograd=True, device="cuda"),
}


def convert(array, run, dtype, layout):
    """A float64 NumPy array as the run's framework has it, in a memory layout, and as float64 after that rounding."""
    floating = np.issubdtype(array.dtype, np.floating)
    if run.framework == "torch":
        tensor = torch.from_numpy(array.copy()).to(run.device)
        tensor = lay_out_tensor(tensor.to(getattr(torch, dtype)) if floating else tensor, layout)
        return tensor.requires_grad_(floating and run.autograd), as_numpy(tensor).copy()
    rounded = lay_out(array.astype(dtype) if floating else array, layout)
    exact = rounded.astype(np.float64) if floating else rounded
    if run.framework == "cupy":
        import cupy

        return lay_out(cupy.asarray(rounded), layout), exact
    return array_api_strict.asarray(rounded.copy()) if run.framework == "array-api" else rounded, exact


def lay_out(array, layout):
    """The same numbers otherwise in memory: Fortran order, every second element, backwards, or read-only."""
    match layout:
        case "fortran":
            return np.asfortranarray(array)
        case "stepped":
            spread = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
            spread[..., ::2] = array
            return spread[..., ::2]
        case "reversed":
            return array[..., ::-1].copy()[..., ::-1]
        case "readonly":
            array = array.copy()
            array.flags.writeable = False
    return array


def lay_out_tensor(tensor, layout):
    """As `lay_out`; PyTorch has neither backward strides nor read-only memory."""
    if layout == "fortran" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if layout == "stepped":
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1).flatten(-2)[..., ::2]
    return tensor


def as_numpy(result):
    if framework(result) == "torch":
        return result.detach().to(torch.float64 if result.is_floating_point() else result.dtype).cpu().numpy()
    if framework(result) == "cupy":
        result = result.get()
    return np.asarray(result).astype(np.float64) if is_floating(result) else np.asarray(result)


@contextmanager
def poisoned_memory(run):
    """Inside, `empty` of NumPy, and on a GPU of the run's framework, hands out NaN: an element left unwritten shows."""
    modules = [np, sys.modules[run.framework]] if run in ON_GPU.values() else [np]
    kept = [(module, module.empty) for module in modules]

    def poisoned(empty, *args, **kwargs):
        array = empty(*args, **kwargs)
        if array.shape != ():
            array[...] = math.nan if is_floating(array) else 77
        return array

    for module, empty in kept:
        module.empty = partial(poisoned, empty)
    try:
        yield
    finally:
        for module, empty in kept:
            module.empty = empty


def assert_close(name, result, expected, dtype, wide=False):
    if dtype == "float16" and not wide:  # narrow() saturates
        expected = np.where(np.isinf(expected), expected, expected.clip(-65504, 65504))
    assert result.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(result[~finite], expected[~finite], err_msg=name)
    size = np.abs(expected[finite]).max(initial=1.0)
    np.testing.assert_allclose(result[finite], expected[finite], rtol=0, atol=TOLERANCE[dtype] * size, err_msg=name)


def assert_retrieved(results, expected, args, dtype):
    """Near-ties may swap within rounding: every position must be distinct and have the score it is given."""
    (scores, positions), (wanted, _) = results, expected
    if len(args) == 7:  # of retrieve_stored
        queries, stored, scales, name, _, space, start = args
        keys, mask = perdure.core.stored.decode(stored, scales, name).astype(np.float64), None
    else:
        queries, keys, _, space, mask, start = args
    assert_close("scores", scores, wanted, dtype)
    np.testing.assert_array_equal(positions == -1, wanted == -np.inf)
    truth = perdure.core.retrieval.similarity(queries, np.roll(keys, -start, axis=-2), space)
    truth = truth if mask is None else np.where(mask, truth, -np.inf)
    found = positions >= 0
    if truth.shape[-1]:
        truth = np.take_along_axis(truth, np.where(found, positions, 0), axis=-1)
        assert_close("positions", scores[found], truth[found], dtype)
    for row in positions.reshape(-1, positions.shape[-1]):
        kept = row[row >= 0]
        assert len(set(kept)) == len(kept)


@pytest.mark.parametrize("run", [*RUNS, *(pytest.param(run, marks=pytest.mark.gpu) for run in ON_GPU)])
@pytest.mark.parametrize("name", sorted(KERNELS))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_kernel_agrees_with_its_formula(name, run, data):
    kernel, run = KERNELS[name], {**RUNS, **ON_GPU}[run]
    dtype = data.draw(st.sampled_from(run.dtypes), label="dtype")
    drawn = data.draw(getattr(strategies, f"args_{name}")(), label="args")
    assume(
        run.framework != "array-api" or not {"bfloat16", "float16"} & set(map(str, drawn[3:4]))
    )  # it knows no halves
    layout = data.draw(strategies.LAYOUTS, label="layout")
    pairs = [convert(a, run, dtype, layout) if isinstance(a, np.ndarray) else (a, a) for a in drawn]
    args, exact = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    before = [as_numpy(a).copy() for a in args if framework(a) is not None]

    with np.errstate(all="ignore"), perdure.backend("numpy"):  # for kernels that a formula calls
        expected = kernel.formula(*exact)
    with cuda_host.registered(), perdure.backend(run.backend):
        kernel(*args)  # compiles, which needs the real np.empty
        with poisoned_memory(run):
            results = kernel(*args)

    expected = expected if isinstance(expected, tuple) else (expected,)
    results = results if isinstance(results, tuple) else (results,)
    assert len(results) == len(expected)
    for given_before, array in zip(before, (a for a in args if framework(a) is not None), strict=True):
        np.testing.assert_array_equal(as_numpy(array), given_before, err_msg="an input was changed")
    first = next(a for a in args if framework(a) is not None)
    for i, result in enumerate(results):
        assert framework(result) == framework(first)
        assert result.device == first.device
        if is_floating(result):
            assert result.dtype == (computing_dtype(first) if i in kernel.wide else first.dtype)
    plain = [as_numpy(r) for r in results]
    if name in ("retrieve", "retrieve_stored"):
        assert_retrieved(plain, expected, exact, dtype)
    else:
        for i, (result, wanted) in enumerate(zip(plain, expected, strict=True)):
            assert_close(name, result, wanted, dtype, wide=i in kernel.wide)
    if run.autograd:
        assert_finite_gradients(results, args)


def assert_finite_gradients(results, args):
    total = sum(torch.where(r.isfinite(), r, 0).sum() for r in results if r.is_floating_point() and r.requires_grad)
    if not isinstance(total, torch.Tensor):
        return
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    for gradient in torch.autograd.grad(total, leaves, allow_unused=True):
        assert gradient is None or bool(gradient.isfinite().all())


@pytest.mark.parametrize("space", ["ip", "l2"])
@pytest.mark.parametrize("run", ["numpy", "numba", "torch"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_ties_go_to_the_newest_on_every_backend(run, space, data):
    """On small integers every score is exact, so positions must agree to the last one, ties included."""
    n, q, d, k = (data.draw(st.integers(1, high)) for high in (150, 8, 9, 40))
    whole = strategies.values((2, q, d), kinds=("integers", "equal")), strategies.values((2, n, d), kinds=("integers",))
    queries, keys = (data.draw(w) for w in whole)
    start = data.draw(st.integers(0, n - 1))
    in_order = np.roll(keys, -start, axis=1)
    scores = queries @ in_order.swapaxes(1, 2)
    if space == "l2":
        scores = -np.square(queries[:, :, None] - in_order[:, None]).sum(axis=-1)
    order = np.lexsort((-np.broadcast_to(np.arange(n), scores.shape), -scores), axis=-1)[..., :k]
    kernel, dtype = KERNELS["retrieve"], data.draw(st.sampled_from(FLOATS))
    as_run = torch.from_numpy if run == "torch" else np.asarray
    with perdure.backend("numpy" if run == "torch" else run):
        _, positions = kernel(as_run(queries.astype(dtype)), as_run(keys.astype(dtype)), k, space, None, start)
    np.testing.assert_array_equal(np.asarray(positions)[..., : min(n, k)], order)


def test_every_kernel_has_a_strategy():
    assert all(hasattr(strategies, f"args_{name}") for name in KERNELS)
