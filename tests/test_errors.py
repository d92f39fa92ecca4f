"""One family of errors: what each is, what it says, and that it survives being sent to another process."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from perdure.backends import errors

import perdure

FAMILY = {name: thing for name, thing in vars(errors).items() if name.endswith("Error")}
STANDARD = {
    "ArgumentError": ValueError,
    "ShapeError": ValueError,
    "DTypeError": TypeError,
    "NonFiniteError": ValueError,
    "FrameworkError": TypeError,
    "BackendError": RuntimeError,
    "MissingPackageError": ImportError,
    "DeviceMemoryError": MemoryError,
    "FileError": OSError,
    "RecallError": RuntimeError,
    "StoreError": OSError,
    "QuotaError": Exception,
    "ForkError": RuntimeError,
}


@pytest.mark.parametrize("name", FAMILY)
def test_one_base_and_the_standard_class_beside_it(name):
    error = FAMILY[name]("argument", "this", "that", "Do so.")
    assert isinstance(error, perdure.PerdureError)
    assert isinstance(error, STANDARD.get(name, Exception))
    assert getattr(perdure, name) is FAMILY[name]


def test_the_family_is_complete():
    assert set(FAMILY) == {"PerdureError", *STANDARD}
    assert set(FAMILY) == {name for name in perdure.__all__ if name.endswith("Error")}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_errors_survive_pickling_and_copying(name, travel):
    error = FAMILY[name]("keys", "shape (..., n, 4)", "(3, 5)", "Reshape it.")
    arrived = travel(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error) == "keys: expected shape (..., n, 4), got (3, 5). Reshape it."
    parts = (arrived.argument, arrived.expected, arrived.received, arrived.remedy)
    assert parts == ("keys", "shape (..., n, 4)", "(3, 5)", "Reshape it.")


def test_a_file_error_keeps_the_operating_systems_fields_empty():
    error = perdure.FileError("--file", "UTF-8 text", "bytes", "Pass text.")
    assert error.errno is error.filename is error.strerror is None


A, B = np.ones((2, 3, 4)), np.ones((2, 5, 4))
C = np.ones((1, 2, 3, 5))
NAN, HUGE = np.full((3, 4), np.nan), np.full((3, 4), 1e200)


def memory(**changes):
    return perdure.KNNMemory(**{"rows": 1, "heads": 2, "dim": 4, "capacity": 8} | changes)


WRONG = {
    "shape": (lambda: perdure.top_k(A, np.ones((2, 5, 7)), 1), "ShapeError", "keys", "(..., n, 4)", "(2, 5, 7)"),
    "too few axes": (lambda: perdure.top_k(np.ones(4), B, 1), "ShapeError", "queries", "(..., q, d)", "(4,)"),
    "leading axes": (lambda: perdure.top_k(A, np.ones((3, 5, 4)), 1), "ShapeError", "keys", "(2,)", "(3,)"),
    "k = 0": (lambda: perdure.top_k(A, B, 0), "ArgumentError", "k", "at least 1", "0"),
    "k = -1": (lambda: perdure.top_k(A, B, -1), "ArgumentError", "k", "at least 1", "-1"),
    "k = 1.5": (lambda: perdure.top_k(A, B, 1.5), "ArgumentError", "k", "whole number", "1.5"),
    "k = True": (lambda: perdure.top_k(A, B, True), "ArgumentError", "k", "whole number", "True"),
    "space": (lambda: perdure.top_k(A, B, 1, space="dot"), "ArgumentError", "space", "ip, cosine, l2", "'dot'"),
    "integers": (lambda: perdure.top_k(A.astype(int), B, 1), "DTypeError", "queries", "floating", "int64"),
    "complex": (lambda: perdure.top_k(A + 0j, B, 1), "DTypeError", "queries", "floating", "complex128"),
    "long double": (lambda: perdure.top_k(A.astype("g"), B, 1), "DTypeError", "queries", "floating", "float"),
    "list": (lambda: perdure.top_k([[1.0]], B, 1), "FrameworkError", "queries", "an array", "list"),
    "frameworks": (lambda: perdure.top_k(torch.ones(3, 4), B, 1), "FrameworkError", "keys", "torch", "numpy"),
    "NaN query": (lambda: perdure.top_k(NAN, B, 1), "NonFiniteError", "queries", "finite", "NaN"),
    "NaN key": (lambda: perdure.top_k(A, NAN, 1), "NonFiniteError", "keys", "finite", "NaN"),
    "infinite key": (lambda: perdure.top_k(A, NAN + np.inf, 1), "NonFiniteError", "keys", "finite", "infinity"),
    "huge key": (lambda: perdure.top_k(A, HUGE, 1), "NonFiniteError", "keys", "squared norm", "overflows"),
    "mask dtype": (lambda: perdure.top_k(A, B, 1, mask=np.ones((3, 5))), "DTypeError", "mask", "boolean", "float64"),
    "mask shape": (
        lambda: perdure.top_k(A, B, 1, mask=np.ones((3, 4), bool)),
        "ShapeError",
        "mask",
        "(2, 3, 5)",
        "(3, 4)",
    ),
    "values": (lambda: perdure.attend(A, B, np.ones((2, 6, 4))), "ShapeError", "values", "(..., 5, dv)", "(2, 6, 4)"),
    "positions": (lambda: perdure.attend(A, B, B, A), "DTypeError", "positions", "integers", "float64"),
    "no readings": (perdure.merge, "ArgumentError", "readings", "at least one", "none"),
    "no reading": (lambda: perdure.merge(A), "ArgumentError", "readings[0]", "a Reading", "ndarray"),
    "bias": (lambda: perdure.gate(A, A, np.ones(3)), "ShapeError", "bias", "(2)", "(3,)"),
    "rows": (lambda: memory(rows=0), "ArgumentError", "rows", "at least 1", "0"),
    "capacity": (lambda: memory(capacity=-1), "ArgumentError", "capacity", "at least 1", "-1"),
    "write": (lambda: memory().write(C, C), "ShapeError", "keys", "(1, 2, n, 4)", "(1, 2, 3, 5)"),
    "read": (lambda: memory().read(np.ones((1, 2, 3, 4)), k=0), "ArgumentError", "k", "at least 1", "0"),
    "backend": (lambda: perdure.backend("x").__enter__(), "BackendError", "backend", "numpy, numba", "'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages_name_argument_expected_received_and_remedy(case):
    call, kind, argument, expected, received = WRONG[case]
    with pytest.raises(perdure.PerdureError) as caught:
        call()
    error = caught.value
    assert type(error).__name__ == kind
    assert error.argument == argument
    assert expected in error.expected
    assert received in error.received
    assert error.remedy[0].isupper()
    assert error.remedy[-1] == "."
    assert str(error) == f"{error.argument}: expected {error.expected}, got {error.received}. {error.remedy}"
