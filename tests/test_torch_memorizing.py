"""MemorizingAttention against its definition, token by token in NumPy, and the operator behind it."""

import copy

import numpy as np
import pytest
import torch
from perdure.bindings.torch import MemorizingAttention
from perdure.bindings.torch.memorizing import unit
from perdure.bindings.torch.ops import recall
from perdure.memory.row import Row
from torch_layers import DIM, HEADS, SEGMENT, build, run, tokens

from perdure import ArgumentError


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def definition(layer, x):
    """What the layer should give for one document x (n, DIM), by the equations of section 3 and nothing else."""

    def heads(project):
        each = (x @ project.weight.detach().numpy().T).reshape(len(x), -1, layer.head_dim).transpose(1, 0, 2)
        return each.repeat(HEADS // len(each), axis=0)

    queries, keys, values = heads(layer.query), heads(layer.key), heads(layer.value)
    if layer.keys == "before":
        keys = np.concatenate([np.zeros_like(keys[:, :1]), keys[:, :-1]], axis=1)
    if layer.normalize:
        queries, keys = (a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6) for a in (queries, keys))
    scale = layer.scale.detach().abs().numpy() if layer.normalize else np.full(HEADS, queries.shape[-1] ** -0.5)
    mixed = np.zeros_like(values)
    for h in range(HEADS):
        for p in range(len(x)):
            boundary = p // layer.segment * layer.segment
            end = boundary - (0 if layer.overlap else layer.reach)
            memory = np.arange(max(end - layer.capacity, 0), max(end, 0))
            nearest = memory[np.argsort(-(keys[h, memory] @ queries[h, p]), kind="stable")[: layer.k]]
            near = scale[h] * keys[h, nearest] @ queries[h, p]
            window = np.arange(max(boundary - layer.reach, 0), p + 1)
            local = scale[h] * keys[h, window] @ queries[h, p]
            if layer.combine == "joint":
                weights = softmax(np.concatenate([near, local]))
                mixed[h, p] = weights @ np.concatenate([values[h, nearest], values[h, window]])
                continue
            mixed[h, p] = softmax(local) @ values[h, window]
            if layer.nothing == "zeros":  # slots without an entry hold zeros, and score 0
                near = np.append(near, np.zeros(layer.k - len(near)))
            elif not len(near):
                continue
            share = 1 / (1 + np.exp(-layer.gate[h].item()))
            mixed[h, p] = (1 - share) * mixed[h, p] + share * softmax(near)[: len(nearest)] @ values[h, nearest]
    return mixed.transpose(1, 0, 2).reshape(len(x), -1) @ layer.output.weight.detach().numpy().T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 5},
        {"window": 5, "overlap": False},
        {"normalize": False, "capacity": 9},
        {"combine": "joint", "window": 2, "overlap": False},
        {"nothing": "zeros"},
        {"nothing": "zeros", "k": 15, "head_dim": 5},
        {"segment": 1},
        {"capacity": 2, "k": 4},
        {"window": 5, "kv_heads": 1},
        {"combine": "joint", "kv_heads": 1},
        {"keys": "before"},
        {"keys": "before", "window": 2, "combine": "joint", "overlap": False, "normalize": False},
    ],
    ids=str,
)
def test_the_layer_is_its_definition(options):
    torch.manual_seed(2)
    options = {"capacity": 14, "k": 4, "segment": SEGMENT, "dtype": "float64", **options}
    layer = MemorizingAttention(DIM, HEADS, **options).double()
    with torch.no_grad():
        if layer.scale is not None:
            layer.scale.copy_(torch.tensor([7.0, -3.0]))
        if layer.gate is not None:
            layer.gate.copy_(torch.tensor([0.5, -1.0]))
    x = tokens(2, 41)
    output = run(layer, x, (SEGMENT, 20))[0].detach().numpy()
    for i in range(2):
        np.testing.assert_allclose(output[i], definition(layer, x[i].numpy()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_no_more_neighbours_are_asked_for_than_there_can_be(monkeypatch, combine):
    """The slots left out are those that would have been empty, also where a row starts anew."""
    torch.manual_seed(0)
    k, start = 5 * SEGMENT, torch.tensor([False, True])
    layer = MemorizingAttention(
        DIM, HEADS, segment=SEGMENT, capacity=4 * SEGMENT, k=k, combine=combine, dtype="float64"
    ).double()
    calls = tokens(2, 7 * SEGMENT).split(SEGMENT - 1, dim=1)

    def outputs():
        memory, given = None, []
        for i, x in enumerate(calls):
            output, memory = layer(x, memory, start if i == 3 else None)
            given.append(output)
        return torch.cat(given, dim=1)

    fewer = outputs()
    monkeypatch.setattr(layer, "_slots", lambda position: k)
    torch.testing.assert_close(fewer, outputs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", ["rope", "t5"])
def test_positions_count_distances_only(positions):
    torch.manual_seed(3)
    options = {"capacity": 64, "segment": SEGMENT, "window": 3, "positions": positions, "dtype": "float64"}
    layer = MemorizingAttention(DIM, HEADS, k=64, normalize=False, nothing="local", **options).double()
    with torch.no_grad():
        layer.gate.fill_(-1e9)  # local attention alone
    x = tokens(1, 3 * SEGMENT)
    with_past = run(layer, x)[0][:, -SEGMENT:]
    window = run(layer, x[:, -SEGMENT - 3 :])[0]  # the same tokens, at other absolute positions
    torch.testing.assert_close(with_past[:, :1], window[:, 3:4])
    assert (run(layer, x.flip(1)[:, :4])[0][:, 3] - run(layer, x.flip(1)[:, [1, 0, 2, 3]])[0][:, 3]).abs().max() > 1e-6


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
def test_projections_that_start_equal_find_the_place_that_followed(kv_heads):
    options = {"capacity": 64, "k": 1, "segment": SEGMENT, "kv_heads": kv_heads, "dtype": "float64", "bias": True}
    torch.manual_seed(4)
    layer = MemorizingAttention(DIM, HEADS, **options, keys="before", projections="equal").double()
    layer.output = torch.nn.Identity()
    with torch.no_grad():
        layer.gate.fill_(1e9)  # memory alone
    x = tokens(1, 2 * SEGMENT)
    found = layer(x[:, 3:4], run(layer, x)[1])[0]  # k = 1: the value of one place
    wanted = layer.value(x[:, 4:5]).unflatten(-1, (kv_heads, -1)).repeat_interleave(HEADS // kv_heads, dim=2)
    first = slice(0, DIM // HEADS) if kv_heads == 1 else slice(None)  # with one key head, equal to the first query's
    torch.testing.assert_close(found[..., first], wanted.flatten(2)[..., first])


def test_memory_takes_a_segment_as_it_ends_and_the_newest_capacity_stay():
    layer = build("memorizing")
    memory = None
    for n, expected in [(SEGMENT - 1, 0), (1, 0), (1, SEGMENT), (SEGMENT, 2 * SEGMENT), (2 * SEGMENT, 20)]:
        _, memory = run(layer, tokens(1, n), memory=memory)
        assert memory.tokens.tolist() == [expected]


def test_no_gradient_reaches_what_is_remembered():
    layer, x = build("memorizing"), tokens(1, 3 * SEGMENT).requires_grad_()
    _, memory = run(layer, x)
    gradient = torch.autograd.grad(run(layer, tokens(1, 2), memory=memory)[0].sum(), x, allow_unused=True)
    assert gradient == (None,)


def test_gradient_reaches_query_scale_and_gate_through_memory():
    layer = build("memorizing")
    _, memory = run(layer, tokens(1, 2 * SEGMENT))
    with torch.no_grad():
        layer.gate.fill_(1e3)  # memory alone
    output, _ = layer(tokens(1, 1), memory)
    output.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (layer.query.weight, layer.scale))
    assert layer.value.weight.grad.abs().sum() == 0


def test_a_past_that_is_gone_is_refused_and_a_repeated_one_is_not():
    layer, x = build("memorizing"), tokens(2, SEGMENT)
    _, first = layer(x)
    again = layer(x, first)
    same = layer(x, first)  # the same step asked for twice is taken once
    torch.testing.assert_close(same[0], again[0], rtol=0, atol=0)
    kept = copy.deepcopy(same[1])
    layer(x, again[1])
    with pytest.raises(ArgumentError, match="Memory goes one way"):
        layer(x, first)
    layer(x, kept)


def test_tensors_are_searched_and_stored_on_their_own_memory(monkeypatch):
    layer = MemorizingAttention(DIM, HEADS, capacity=20, k=3, segment=SEGMENT)
    seen = {"search": [], "prepare": []}
    kept = {name: getattr(Row, name) for name in seen}

    def search(row, queries, k):
        seen["search"].append(queries)
        return kept["search"](row, queries, k)

    def prepare(row, parts, tags):
        seen["prepare"] += [parts["keys"], parts["values"]]
        return kept["prepare"](row, parts, tags)

    monkeypatch.setattr(Row, "search", search)
    monkeypatch.setattr(Row, "prepare", prepare)
    queries, start = torch.randn(2, HEADS, 4, DIM // HEADS), torch.zeros(2, dtype=torch.bool)
    _, memory = run(layer, tokens(2, SEGMENT).float())
    recall(memory.token, queries, memory.keys, memory.values, memory.position, start, 3)
    assert len(seen["search"]) >= 2
    assert len(seen["prepare"]) == 4
    assert all(np.shares_memory(array, queries.numpy()) for array in seen["search"][-2:])
    for array, tensor in zip(seen["prepare"], (memory.keys, memory.values) * 2, strict=True):
        assert np.shares_memory(array, tensor.numpy())


def test_two_futures_of_one_past_are_not_mixed_up():
    layer, x = build("memorizing"), tokens(1, SEGMENT)
    _, past = layer(x)
    _, one = layer(x, past)
    _, other = layer(-x, past)
    layer(x, one)
    with pytest.raises(ArgumentError, match="Memory goes one way"):
        layer(x, other)


def test_the_operator_keeps_its_promises():
    layer = build("memorizing")
    _, memory = run(layer, tokens(2, 3 * SEGMENT))
    queries = torch.randn(2, HEADS, 4, DIM // HEADS, dtype=torch.float64)
    start = torch.tensor([False, True])
    arguments = (memory.token, queries, memory.keys, memory.values, memory.position, start, 3)
    torch.library.opcheck(recall, arguments)


def test_a_step_is_told_by_its_numbers_whoever_reuses_their_place():
    """A compiled graph writes other numbers where an operator's arguments were, once the operator has returned."""
    layer = build("memorizing")
    _, memory = run(layer, tokens(2, 3 * SEGMENT))
    queries = torch.randn(2, HEADS, 4, DIM // HEADS, dtype=torch.float64)
    given = (memory.keys, memory.values, memory.position, torch.tensor([False, True]))
    lent = [tensor.clone() for tensor in given]
    expected = recall(memory.token, queries, *lent, 3)
    for tensor in lent:
        tensor.zero_()
    torch.testing.assert_close(recall(memory.token, queries, *given, 3), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # raised inside PyTorch
def test_inductor_compiles_a_training_step():
    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
    layer, x = build("memorizing, cache").float(), tokens(2, 2 * SEGMENT).float()
    compiled = torch.compile(layer, fullgraph=True)
    memory, expected_memory = layer.memory(2), layer.memory(2)
    for segment in x.split(SEGMENT, dim=1):
        output, memory = compiled(segment, memory)
        expected, expected_memory = layer(segment, expected_memory)
        torch.testing.assert_close(output, expected)
        gradients = [torch.autograd.grad(o.sum(), list(layer.parameters())) for o in (output, expected)]
        torch.testing.assert_close(*gradients)


def test_only_the_newest_state_can_be_copied():
    layer, x = build("memorizing"), tokens(2, 4 * SEGMENT)
    _, old = run(layer, x[:, :SEGMENT])
    copied = copy.deepcopy(old)
    _, new = run(layer, x[:, SEGMENT:], memory=old)
    for copies in (copy.deepcopy, lambda m: m.select([1]), lambda m: m.state_dict(), lambda m: m.join([m])):
        copies(new)
        with pytest.raises(ArgumentError, match="has gone on"):
            copies(old)
    torch.testing.assert_close(layer(x[:, SEGMENT:], copied)[0], run(layer, x)[0][:, SEGMENT:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 5e-2), (torch.float32, 1e-5)])
def test_rotary_positions_far_into_a_document_are_as_accurate_as_near_its_start(dtype, tolerance):
    torch.manual_seed(5)
    layer = MemorizingAttention(32, 1, capacity=1, segment=32, window=32, positions="rope", normalize=False, k=1)
    with torch.no_grad():
        layer.gate.fill_(-30)  # local attention alone
    x = torch.randn(1, 64, 32).repeat(1, 50, 1)
    expected = layer.double()(x.double())[0]
    output, _ = layer.to(dtype)(x.to(dtype))
    far, scale = slice(48 * 64, 49 * 64), expected.square().mean().sqrt()
    torch.testing.assert_close(expected[:, far], expected[:, 64:128])  # the text repeats itself
    assert (output[:, far].double() - expected[:, far]).abs().mean() < tolerance * scale


@pytest.mark.parametrize("size", [1e-2, 1.0, 300.0, 3e4])
def test_half_precision_normalises_vectors_of_any_size(size):
    vectors = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    vectors *= size / vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit(vectors.half()).double(), unit(vectors), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("heads", {"heads": 5}),
        ("capacity", {"capacity": 0}),
        ("k", {"k": 0}),
        ("segment", {"segment": 2.5}),
        ("combine", {"combine": "sum"}),
        ("positions", {"positions": "alibi"}),
        ("nothing", {"nothing": "nan"}),
        ("index", {"index": "magic"}),
        ("dtype", {"dtype": "complex64"}),
        ("window", {"window": -1}),
        ("kv_heads", {"heads": 4, "kv_heads": 3}),
        ("overlap", {"combine": "joint", "window": 4}),
        ("scale", {"scale": 0}),
        ("keys", {"keys": "after"}),
        ("overlap", {"overlap": "no"}),
        ("normalize", {"normalize": None}),
        ("projections", {"projections": "tied"}),
    ],
)
def test_wrong_configurations_are_named(argument, options):
    with pytest.raises(ArgumentError) as caught:
        MemorizingAttention(**{"dim": DIM, "heads": HEADS, "capacity": 8, **options})
    assert caught.value.argument == argument
