"""The CUDA kernels as PyTorch operators: reached through the public functions, differentiated, and traced.

Here they run on the CPU, on tensors in main memory, as in test_cuda_kernels.py.
"""

from __future__ import annotations

import cuda_host
import pytest
import torch
from perdure.backends import torch as torch_backend
from perdure.backends.cuda import operators

import perdure

TOP_K = ["certify_64_float32", "finish_float32"]


@pytest.fixture(autouse=True)
def on_host(monkeypatch):
    monkeypatch.setattr(torch_backend, "KERNELS_ON", {"cpu"})
    monkeypatch.setattr(torch_backend, "OPERATORS", [operators])
    cuda_host.launched.clear()
    torch.manual_seed(0)
    with cuda_host.registered():
        yield


def pairs(*lead, n=70, d=5, dv=3, dtype=torch.float32):
    return torch.randn(*lead, n, d, dtype=dtype), torch.randn(*lead, n, dv, dtype=dtype)


def test_public_functions_reach_the_kernels():
    keys, values = pairs(2)
    queries = torch.randn(2, 4, 5)
    near = perdure.top_k(queries, keys, 6)
    read = perdure.attend(queries, keys, values, near.positions)
    signal = perdure.fit(torch.randn(2, 50, 3), perdure.gaussian_basis(16))
    seen = perdure.expected_value(signal, torch.rand(2, 4), 0.01)
    assert cuda_host.launched == [*TOP_K, "attend_float32", "expect_float32"]
    with perdure.backend("numpy"):
        expected = perdure.top_k(queries.numpy(), keys.numpy(), 6)
        reading = perdure.attend(queries.numpy(), keys.numpy(), values.numpy(), expected.positions)
    assert near.positions.tolist() == expected.positions.tolist()
    torch.testing.assert_close(read.output, torch.from_numpy(reading.output))
    assert seen.shape == (2, 4, 3)


def test_half_precision_is_computed_in_single():
    keys, _ = pairs()
    near = perdure.top_k(keys[:3].to(torch.bfloat16), keys.to(torch.bfloat16), 1)
    assert near.scores.dtype == torch.bfloat16
    assert cuda_host.launched == TOP_K


@pytest.mark.parametrize("lead", [(), (2,)])
def test_attention_has_its_gradient(lead):
    keys, values = pairs(*lead, n=9, dtype=torch.float64)
    queries = torch.randn(*lead, 3, 5, dtype=torch.float64)
    positions = torch.tensor([[0, 4, -1, 4], [8, 7, 6, 5], [-1, -1, -1, -1]]).expand(*lead, 3, 4)
    arguments = [t.requires_grad_() for t in (queries, keys, values)]

    def finite(*tensors):
        output, lse = operators.attention(*tensors, positions, 0.4, None, 3)
        return output, lse[..., :2]  # the third query sees nothing: -inf

    assert torch.autograd.gradcheck(finite, arguments, nondet_tol=1e-12)


def test_keys_shared_by_all_rows_get_the_gradient_of_all():
    keys, values = pairs(1, dtype=torch.float64)
    queries, positions = torch.randn(3, 2, 5, dtype=torch.float64), torch.randint(70, (3, 2, 4))
    keys.requires_grad_()
    (gradient,) = torch.autograd.grad(perdure.attend(queries, keys, values, positions).output.sum(), keys)
    assert "attend_backward_float64" in cuda_host.launched
    many = keys.detach().expand(3, 70, 5).clone().requires_grad_()
    (parts,) = torch.autograd.grad(perdure.attend(queries, many, values.expand(3, 70, 3), positions).output.sum(), many)
    torch.testing.assert_close(gradient, parts.sum(0, keepdim=True))


def test_retrieval_with_a_gradient_is_left_to_the_formula():
    keys, _ = pairs()
    near = perdure.top_k(keys[:3].clone().requires_grad_(), keys, 2)
    assert near.scores.requires_grad
    assert cuda_host.launched == []


CALLS = {
    "retrieve": lambda k, v: (k[:, :3], k, 4, "ip", torch.rand(2, 3, 70) < 0.5, 0),
    "retrieve_stored": lambda k, v: (k[:, :3], (9 * k).to(torch.int8), torch.rand(2, 70), "int8", 4, 1),
    "attend": lambda k, v: (k[:, :3].clone().requires_grad_(), k, v, torch.randint(70, (2, 3, 4)), 0.5, 2),
    "expected": lambda k, v: (v, torch.rand(2, 3), torch.rand(2, 3) + 0.1, torch.rand(70), torch.ones(70), "gaussian"),
    "systematic": lambda k, v: (torch.rand(2, 3, 9), 5, torch.rand(2, 3, 1)),
    "histogram": lambda k, v: (torch.rand(2, 3), torch.rand(2, 3) + 0.1, torch.linspace(0, 1, 6), "sparsemax"),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_keep_their_contract(name):
    torch.library.opcheck(getattr(operators, name), CALLS[name](*pairs(2)))


def test_operators_are_traced_whole():
    keys, values = pairs(2)

    @torch.compile(backend="eager", fullgraph=True)
    def read(queries):
        _, positions = operators.retrieve(queries, keys, 4, "ip", None, 0)
        return operators.attention(queries, keys, values, positions, 0.5, None, 0)[0].sum()

    queries = torch.randn(2, 3, 5, requires_grad=True)
    read(queries).backward()
    assert cuda_host.launched == [*TOP_K, "attend_float32", "attend_backward_float32"]
    assert queries.grad is not None
