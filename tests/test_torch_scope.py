"""MemoryScope: memory for a model whose own code passes none along."""

import pytest
import torch
from perdure.bindings.torch import (
    ContinuousAttention,
    MemorizingAttention,
    MemoryScope,
    MemoryTransformer,
    TransformerXLAttention,
)
from torch.utils.checkpoint import checkpoint
from torch_layers import DIM, SEGMENT, build, run, tokens

from perdure import ArgumentError, ShapeError


class Model(torch.nn.Module):
    """Two layers, and code that knows nothing of memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = build("memorizing"), build("continuous")
        self.fails, self.recomputes = False, False

    def forward(self, x):
        x = x + self.first(x)[0]
        if self.fails:
            raise RuntimeError("out of luck")
        if self.recomputes:
            return x + checkpoint(lambda x: self.second(x)[0], x, use_reentrant=False)
        return x + self.second(x)[0]


def by_hand(model, calls, start=None):
    first = second = None
    outputs = []
    for x in calls:
        a, first = model.first(x, first, start)
        b, second = model.second(x + a, second, start)
        outputs.append(x + a + b)
    return torch.stack(outputs)


def calls(count=4, rows=2):
    return tokens(rows, count * SEGMENT).split(SEGMENT, dim=1)


def test_every_layer_goes_on_from_its_last_call():
    model = Model()
    expected = by_hand(model, calls())
    with MemoryScope(model) as scope:
        outputs = torch.stack([model(x) for x in calls()])
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert {name: state.position.tolist() for name, state in scope.states.items()} == {
        "first": [4 * SEGMENT] * 2,
        "second": [4 * SEGMENT] * 2,
    }
    torch.testing.assert_close(model(calls()[0]), expected[0])  # outside, the model is as it was


def test_an_exception_leaves_memory_as_it_was_and_the_model_free():
    model = Model()
    expected = by_hand(model, calls())
    scope, outputs = MemoryScope(model), []
    with scope:
        for i, x in enumerate(calls()):
            if i == 2:
                model.fails = True
                with pytest.raises(RuntimeError, match="luck"):
                    model(-x)
                model.fails = False
            outputs.append(model(x))
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=0, atol=0)
    model.fails = True
    with pytest.raises(RuntimeError, match="luck"), scope:
        model(calls()[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_called_by_itself_is_held_too_after_a_failure_as_well():
    model = Model()
    with MemoryScope(model) as scope:
        model.fails = True
        with pytest.raises(RuntimeError, match="luck"):
            model(calls()[0])
        for x in calls():
            output, _ = model.first(x)
    torch.testing.assert_close(output, run(model.first, torch.cat(calls(), dim=1))[0][:, -SEGMENT:])
    assert list(scope.states) == ["first"]


def test_a_scope_goes_on_where_it_was_left_or_starts_again():
    model = Model()
    expected = by_hand(model, calls())
    scope = MemoryScope(model)
    for x, whole in zip(calls(), expected, strict=True):
        with scope:
            torch.testing.assert_close(model(x), whole, rtol=0, atol=0)
    scope.clear()
    with scope:
        torch.testing.assert_close(model(calls()[0]), expected[0], rtol=0, atol=0)


def test_the_inner_of_two_scopes_holds_the_memory():
    model, x = build("transformer-xl"), calls()
    with MemoryScope(model) as outer:
        model(x[0])
        with MemoryScope(model) as inner:
            model(x[1])
        model(x[1])
    assert (outer.states[""].position[0], inner.states[""].position[0]) == (2 * SEGMENT, SEGMENT)


def test_a_memory_that_is_passed_is_used_and_not_held():
    layer, (x, y, *_) = build("memorizing"), calls()
    with MemoryScope(layer) as scope:
        _, own = layer(x, layer.memory(2))
        assert scope.states == {}
        layer(x)
        output, _ = layer(y, own)
    assert scope.states[""].position.tolist() == [SEGMENT] * 2
    torch.testing.assert_close(output, run(layer, torch.cat([x, y], dim=1))[0][:, SEGMENT:])


def test_what_is_announced_reaches_every_layer_once():
    model, x = Model(), calls()
    with MemoryScope(model) as scope:
        model(x[0])
        scope.announce(start=torch.tensor([True, False]))
        model(x[1])
        model(x[2])
    assert scope.states["second"].position.tolist() == [2 * SEGMENT, 3 * SEGMENT]
    mask = torch.ones(2, SEGMENT, dtype=torch.bool)
    mask[1, :2] = False
    with scope:
        scope.announce(mask=mask)
        model(x[3])
    assert scope.states["first"].position.tolist() == [3 * SEGMENT, 4 * SEGMENT - 2]


def test_a_row_that_starts_starts_once_though_a_layer_is_called_twice():
    class Twice(Model):
        def forward(self, x):
            return self.first(self.first(x)[0])[0]

    model, x = Twice(), calls()
    with MemoryScope(model) as scope:
        model(x[0])
        scope.announce(start=torch.tensor([True, False]))
        model(x[1])
    assert scope.states["first"].position.tolist() == [2 * SEGMENT, 4 * SEGMENT]


def test_gradients_are_those_of_memory_passed_along():
    model, gradients = Model(), []
    by_hand(model, calls()).square().sum().backward()
    gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    with MemoryScope(model):
        sum(model(x).square().sum() for x in calls()).backward()
    gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_checkpointed_block_is_refused_and_a_memory_transformer_is_not():
    model = Model()
    model.recomputes = True
    with MemoryScope(model):
        output = model(calls()[0])
        with pytest.raises(ArgumentError, match="checkpointed"):
            output.sum().backward()
    gradients = []
    for checkpointing in False, True:
        torch.manual_seed(0)
        layers = [
            TransformerXLAttention(DIM, 2, segment=SEGMENT, window=4),
            MemorizingAttention(DIM, 2, segment=SEGMENT, capacity=30, k=3),
            ContinuousAttention(DIM, 2, segment=SEGMENT, basis=16, samples=12),
        ]
        transformer = MemoryTransformer(7, layers, checkpointing=checkpointing)
        words = torch.randint(7, (2, 3 * SEGMENT), generator=torch.Generator().manual_seed(1))
        with MemoryScope(transformer) as scope:
            for part in words.split(SEGMENT, dim=1):
                transformer(part)[0].square().sum().backward()
        assert [state.position[0].item() for state in scope.states[""]] == [3 * SEGMENT] * 3
        gradients.append([p.grad for p in transformer.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_wrong_use_is_named():
    with pytest.raises(ArgumentError) as caught:
        MemoryScope(torch.nn.Linear(2, 2))
    assert caught.value.argument == "model"
    model = Model()
    with MemoryScope(model) as scope:
        with pytest.raises(ArgumentError, match="not entered"), scope:
            pass
        model(calls()[0])
        with pytest.raises(ShapeError, match="rows"):
            model(calls()[0][:1])
        model(calls()[1])
    assert scope.states["first"].position.tolist() == [2 * SEGMENT] * 2
