"""CompressiveAttention against its definition, token by token in NumPy, and what its loss trains."""

import numpy as np
import pytest
import torch
from perdure.bindings.torch import CompressiveAttention
from torch_layers import DIM, HEADS, SEGMENT, build, run, tokens

import perdure
from perdure import ArgumentError


def attention_of(layer, x, i, past):
    """Weights (HEADS, states) and values of token i over the states `past`, then its own segment up to itself."""
    w = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    begin, d = i // SEGMENT * SEGMENT, layer.head_dim
    states = np.concatenate([past, x[begin : i + 1]])
    distances = np.concatenate([np.arange(i - begin + len(past), i - begin, -1), np.arange(i - begin, -1, -1)])
    angles = distances[:, None] * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    r = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) @ w["relative.weight"].T
    weights, seen = [], []
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        q, k = w["query.weight"][part] @ x[i], states @ w["key.weight"][part].T
        scores = k @ (q + w["content_bias"][h]) + r[:, part] @ (q + w["position_bias"][h])
        powers = np.exp(scores / np.sqrt(d))
        weights.append(powers / powers.sum())
        seen.append(weights[-1] @ states @ w["value.weight"][part].T)
    return np.array(weights), np.concatenate(seen) @ w["output.weight"].T


def definition(layer, x):
    """What the layer should give for one document x (n, DIM)."""
    window, older, outputs = np.zeros((0, DIM)), np.zeros((0, DIM)), []
    usage = np.zeros(0)
    for first in range(0, len(x), SEGMENT):
        segment = x[first : first + SEGMENT]
        usage = np.concatenate([usage, np.zeros(len(segment))])
        for i in range(first, first + len(segment)):
            weights, output = attention_of(layer, x, i, np.concatenate([older, window]))
            drawn = weights.sum(axis=0)[len(older) :]
            usage[: len(drawn)] += drawn
            outputs.append(output)
        window = np.concatenate([window, segment])
        gone, window = window[: -layer.reach], window[-layer.reach :]
        left, usage = usage[: len(gone)], usage[len(gone) :]
        if len(gone):
            full = len(gone) // layer.rate * layer.rate  # what is no block yet waits
            gone, waiting = gone[:full], gone[full:]
            window, usage = np.concatenate([waiting, window]), np.concatenate([left[full:], usage])
            weights = tuple(p.detach().numpy() for p in layer.compressor)
            made = perdure.compress(gone, layer.rate, layer.method, weights, left[:full])
            older = np.concatenate([older, made])[-layer.compressed :]
    return np.array(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "mean", "compressed": 20},
        {"method": "max", "rate": 2, "compressed": 2},
        {"method": "dilated", "rate": 3},
        {"method": "most_used", "window": 2 * SEGMENT, "rate": 6},
        {"method": "most_used", "rate": 2, "compressed": 5},
        {"rate": 1, "window": 12},
    ],
    ids=str,
)
def test_the_layer_is_its_definition(options):
    torch.manual_seed(2)
    options = {"segment": SEGMENT, "window": SEGMENT, "compressed": 4, "rate": 3, **options}
    layer = CompressiveAttention(DIM, HEADS, **options).double()
    torch.nn.init.normal_(layer.content_bias)
    torch.nn.init.normal_(layer.position_bias)
    x = tokens(1, 5 * SEGMENT + 2)
    expected = definition(layer, x[0].numpy())
    for cuts in ((), (4, 9, 10)):
        output = run(layer, x, cuts)[0][0].detach().numpy()
        np.testing.assert_allclose(output, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["compressive", "compressive, dilated"])
def test_the_reconstruction_loss_trains_the_compressor_and_nothing_else_does(name):
    layer = build(name)
    output, memory = run(layer, tokens(2, 4 * SEGMENT))
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def reached(loss):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return {n for n, g in zip(names, gradients, strict=True) if g is not None and g.abs().sum() > 0}

    compressor = {n for n in names if n.startswith("compressor")}
    assert reached(memory.loss) == compressor
    assert reached(output.square().sum()) == set(names) - compressor


def test_keys_and_values_go_on_learning_once_there_is_memory():
    layer = build("compressive")
    _, memory = run(layer, tokens(1, 4 * SEGMENT))
    output, _ = layer(tokens(1, SEGMENT, seed=2), memory)
    output.square().sum().backward()
    assert all(p.weight.grad.abs().sum() > 0 for p in (layer.key, layer.value))


def test_the_loss_is_what_is_lost():
    layer = build("compressive")
    with torch.no_grad():
        for weight in layer.compressor:
            weight.zero_()
    equal = tokens(1, 1).expand(1, 2 * SEGMENT, DIM)  # states all alike, which a mean keeps whole
    _, memory = run(layer, equal)
    assert memory.loss.item() > 0
    with torch.no_grad():
        layer.compressor[0].copy_(torch.eye(DIM)[..., None].expand(-1, -1, 2) / 2)
    _, memory = run(layer, equal)
    assert memory.loss.item() < 1e-20


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("segment", {"segment": 7}),
        ("window", {"window": 3}),
        ("window", {"window": 4, "method": "most_used"}),
        ("compressed", {"compressed": 0}),
        ("rate", {"rate": 0}),
        ("method", {"method": "zip"}),
    ],
)
def test_wrong_configurations_are_named(argument, options):
    with pytest.raises(ArgumentError) as caught:
        CompressiveAttention(DIM, HEADS, **{"segment": 8, "window": 8, "compressed": 4, "rate": 2, **options})
    assert caught.value.argument == argument
