"""ContinuousAttention against the ∞-former's equations, written with every score and every key."""

from dataclasses import replace

import numpy as np
import perdure.core.density
import pytest
import torch
from perdure.bindings.torch import ContinuousAttention, TransformerXLAttention
from perdure.core.consolidation import fitted
from torch_layers import DIM, HEADS, SEGMENT, build, run, tokens

import perdure
from perdure import ArgumentError


def definition(layer, x):
    """What the layer adds to Transformer-XL for one document x (n, DIM): section 3 of the paper, in NumPy."""
    w = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    d, signal, outputs = layer.head_dim, None, []
    centers, widths = layer.basis.centers, layer.basis.widths
    edges, histogram = np.linspace(0, 1, 129), None
    for first in range(0, len(x), SEGMENT):
        if first:
            new = x[first - SEGMENT : first]
            if layer.input_gate is not None:
                padded = np.pad(new, ((1, 1), (0, 0)))
                near = np.stack([padded[j : j + SEGMENT] for j in range(3)], axis=-1)  # (n, DIM, 3)
                score = np.einsum("ncj,ocj->no", near, w["input_gate.weight"]) + w["input_gate.bias"]
                new = new / (1 + np.exp(-score))
            if signal is None:
                signal = perdure.fit(new, layer.basis, layer.scheme.ridge)
                signal = replace(signal, coefficients=fitted(layer.scheme, new))
            else:
                where = histogram if layer.sticky else None
                signal = signal.update(new, layer.contraction, layer.scheme.samples, where)
        histogram = np.zeros(128)
        q = (x[first : first + SEGMENT] @ w["query.weight"].T).reshape(-1, HEADS, d)
        if signal is None:
            outputs.append(np.zeros((len(q), DIM)))
            continue
        B, heads = signal.coefficients, []
        for h in range(HEADS):
            part = slice(h * d, (h + 1) * d)
            s = q[:, h] @ (B @ w["signal_key.weight"][part].T).T / np.sqrt(d)  # (n, N)
            if layer.looking_mean is not None:
                mean = 1 / (1 + np.exp(-(s @ w["looking_mean"])))
                variance = np.maximum(np.log1p(np.exp(s @ w["looking_variance"])), layer.floor)
            else:
                p = np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)
                mean = p @ centers
                variance = np.maximum(p @ (centers**2 + widths**2) - mean**2, layer.floor)
            seen = perdure.expected_value(signal, mean, variance, layer.density)  # E[x(t)]
            heads.append(seen @ w["signal_value.weight"][part].T)
            histogram += perdure.core.density.mass(mean, variance, edges, layer.density).sum(axis=0)
        outputs.append(np.concatenate(heads, axis=1) @ w["signal_output.weight"].T)
    return np.concatenate(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sticky": False, "density": "gaussian"},
        {"density": "sparsemax", "floor": 0.01},
        {"density": "biweight", "affine": False},
        {"gated": True, "contraction": 0.75, "ridge": 1e-2},
        {"basis": perdure.gaussian_basis(20, [0.05, 0.1]), "samples": 40, "window": 4},
    ],
    ids=str,
)
def test_the_layer_is_its_definition(options):
    torch.manual_seed(2)
    options = {"basis": 16, "samples": 12, "segment": SEGMENT, **options}
    layer = ContinuousAttention(DIM, HEADS, **options).double()
    local = TransformerXLAttention(DIM, HEADS, segment=SEGMENT, window=layer.reach).double()
    local.load_state_dict({name: p for name, p in layer.state_dict().items() if name in local.state_dict()})
    x = tokens(1, 4 * SEGMENT + 3)
    expected = definition(layer, x[0].numpy())
    for cuts in ((), (4, 9, 10)):
        added = (run(layer, x, cuts)[0] - run(local, x)[0])[0].detach().numpy()
        np.testing.assert_allclose(added, expected, rtol=1e-8, atol=1e-9)


def test_memory_does_not_grow():
    layer, memory, sizes = build("continuous"), None, set()
    for segment in tokens(1, 20 * SEGMENT).split(SEGMENT, dim=1):
        _, memory = layer(segment, memory)
        sizes.add(memory.nbytes)
    assert len(sizes) == 1


def test_the_regulariser_is_the_divergence_of_what_was_looked_at():
    layer = build("continuous")
    x = tokens(1, 2 * SEGMENT)
    _, memory = layer(x[:, :SEGMENT])
    assert memory.loss.item() == 0  # nothing to look at yet
    _, memory = layer(x[:, SEGMENT:], memory)
    gradient = torch.autograd.grad(memory.loss, layer.looking_variance)[0]
    assert memory.loss.item() > 0
    assert gradient.abs().sum() > 0
    assert "loss" not in memory.state_dict()
    halves = [run(layer, x, cuts)[1].loss for cuts in ((), (SEGMENT,))]
    torch.testing.assert_close(*halves)  # the mean over the tokens that had a signal to look at


def test_gradient_reaches_the_gate_through_the_newest_segment_only():
    layer, x = build("continuous, gated"), tokens(1, 3 * SEGMENT)
    memory = run(layer, x[:, : 2 * SEGMENT])[1]
    output, memory = layer(x[:, 2 * SEGMENT :], memory)
    assert torch.autograd.grad(output.sum(), layer.input_gate.weight)[0].abs().sum() > 0
    output, _ = layer(tokens(1, SEGMENT), memory)
    assert not memory.coefficients.requires_grad


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("basis", {"basis": 0}),
        ("basis", {"basis": perdure.core.basis.rectangular_basis(4)}),
        ("contraction", {"contraction": 1.0}),
        ("ridge", {"ridge": -1}),
        ("samples", {"samples": 0}),
        ("density", {"density": "uniform"}),
        ("compat", {"compat": "theirs"}),
        ("floor", {"floor": float("nan")}),
        ("width", {"width": 0}),
        ("centre", {"centre": 7}),
        ("regulariser", {"regulariser": "a"}),
        ("sticky", {"sticky": "no"}),
    ],
)
def test_wrong_configurations_are_named(argument, options):
    with pytest.raises(ArgumentError) as caught:
        ContinuousAttention(DIM, HEADS, **{"segment": 8, "basis": 16, "samples": 8, **options})
    assert caught.value.argument == argument


def test_the_authors_centre_lies_outside_of_the_signal():
    options = {"segment": 8, "basis": 16, "samples": 12, "centre": -1.0}
    assert ContinuousAttention(DIM, HEADS, **options, compat="infinite-former").centre == -1
    with pytest.raises(ArgumentError, match="centre"):
        ContinuousAttention(DIM, HEADS, **options)
