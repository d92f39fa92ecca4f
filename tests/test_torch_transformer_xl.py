"""TransformerXLAttention against its definition, token by token in NumPy."""

import numpy as np
import pytest
import torch
from perdure.bindings.torch import TransformerXLAttention
from torch_layers import DIM, HEADS, SEGMENT, build, run, tokens

from perdure import ArgumentError


def definition(layer, x):
    """What the layer should give for one document x (n, DIM), by the equations of section 3.3 and nothing else."""
    w = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    d = layer.head_dim
    half = 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    out = np.zeros((len(x), HEADS, d))
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        q, k, v = (x @ w[f"{name}.weight"][part].T for name in ("query", "key", "value"))
        for i in range(len(x)):
            seen = np.arange(max(i // layer.segment * layer.segment - layer.reach, 0), i + 1)
            r = np.stack([w["relative.weight"][part] @ np.concatenate([np.sin(s), np.cos(s)]) for s in
                          ((i - j) * half for j in seen)])  # fmt: skip
            scores = k[seen] @ (q[i] + w["content_bias"][h]) + r @ (q[i] + w["position_bias"][h])
            weights = np.exp(scores / np.sqrt(d))
            out[i, h] = weights / weights.sum() @ v[seen]
    return out.reshape(len(x), -1) @ w["output.weight"].T


@pytest.mark.parametrize("window", [0, 3, SEGMENT, 20])
@pytest.mark.parametrize("cuts", [(), (SEGMENT,), (4, 9, 10)])
def test_the_layer_is_its_definition(window, cuts):
    torch.manual_seed(2)
    layer = TransformerXLAttention(DIM, HEADS, segment=SEGMENT, window=window, head_dim=4).double()
    torch.nn.init.normal_(layer.content_bias)
    torch.nn.init.normal_(layer.position_bias)
    x = tokens(1, 4 * SEGMENT + 1)
    output = run(layer, x, cuts)[0][0].detach().numpy()
    np.testing.assert_allclose(output, definition(layer, x[0].numpy()), rtol=1e-9, atol=1e-12)


def test_the_window_holds_inputs_and_no_gradient_reaches_them():
    layer, x = build("transformer-xl"), tokens(1, 3 * SEGMENT).requires_grad_()
    _, memory = layer(x)
    torch.testing.assert_close(memory.hidden, x[:, -memory.hidden.shape[1] :].detach())
    assert torch.autograd.grad(layer(x.detach(), memory)[0].sum(), x, allow_unused=True) == (None,)


def test_distances_need_an_even_width():
    with pytest.raises(ArgumentError, match="even"):
        TransformerXLAttention(9, 3)
