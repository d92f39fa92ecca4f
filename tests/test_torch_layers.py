"""What every layer with memory promises, tested once for all of them."""

import copy
import functools
import pickle

import pytest
import torch
from perdure.bindings.torch import (
    CompressiveAttention,
    ContinuousAttention,
    MemorizingAttention,
    TransformerXLAttention,
)
from torch.utils.checkpoint import checkpoint
from torch_layers import BUILD, DIM, HEADS, SEGMENT, build, run, tokens

from perdure import ArgumentError, DTypeError, FrameworkError, NonFiniteError, ShapeError, gaussian_basis

every_layer = pytest.mark.parametrize("name", BUILD)
LONG = 5 * SEGMENT + 2


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_layer
@pytest.mark.parametrize(
    "cuts",
    [
        range(1, LONG),
        range(SEGMENT, LONG, SEGMENT),
        range(SEGMENT - 1, LONG, SEGMENT - 1),
        (1, 1, 2 * SEGMENT + 1, 2 * SEGMENT + 2, LONG),
        (SEGMENT, SEGMENT, 2 * SEGMENT, 2 * SEGMENT, 2 * SEGMENT, 3 * SEGMENT, LONG, LONG),
    ],
    ids=["token by token", "segments", "out of step", "uneven, some empty", "empty at boundaries"],
)
def test_how_calls_are_cut_changes_nothing(name, cuts):
    layer, x = build(name), tokens(2, LONG)
    whole, after = run(layer, x)
    parts, memory = run(layer, x, cuts)
    close(parts, whole)
    close(memory.position, after.position)
    following = tokens(2, 3, seed=2)
    close(layer(following, memory)[0], layer(following, after)[0])


@every_layer
@pytest.mark.parametrize("cuts", [(), (7,), range(5, LONG, 5), range(1, LONG)], ids=["whole", "two", "fives", "ones"])
def test_padding_changes_nothing(name, cuts):
    layer, x = build(name), tokens(3, LONG)
    alone = [run(layer, x[i : i + 1, : LONG - pad])[0][0] for i, pad in enumerate((0, 3, SEGMENT + 1))]
    padded, mask = torch.full_like(x, torch.nan), torch.zeros(3, LONG, dtype=torch.bool)
    for i, pad in enumerate((0, 3, SEGMENT + 1)):
        padded[i, pad:], mask[i, pad:] = x[i, : LONG - pad], True
    output, memory = run(layer, padded, cuts, mask=mask)
    for i, expected in enumerate(alone):
        close(output[i, LONG - len(expected) :], expected)
    assert (output[~mask] == 0).all()
    assert memory.position.tolist() == [LONG, LONG - 3, LONG - SEGMENT - 1]


@every_layer
def test_padding_inside_a_call_and_on_the_right(name):
    layer, x = build(name), tokens(1, 9)
    expected = run(layer, x)[0]
    spread = torch.zeros(1, 20, DIM, dtype=x.dtype)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, [0, 1, 2, 5, 8, 9, 12, 13, 14]] = True
    spread[mask] = x[0]
    close(run(layer, spread, (4, 11), mask=mask)[0][mask], expected[0])


@every_layer
@pytest.mark.parametrize("read", [SEGMENT, 2 * SEGMENT + 1], ids=["at a boundary", "inside a segment"])
def test_a_row_that_starts_is_a_fresh_row_and_others_go_on(name, read):
    layer, x, new = build(name), tokens(2, read), tokens(2, LONG, seed=3)
    _, memory = run(layer, x)
    going_on, _ = layer(new, copy.deepcopy(memory))
    output, after = layer(new, memory, start=torch.tensor([False, True]))
    close(output[0], going_on[0])
    close(output[1], layer(new[1:])[0][0])
    assert after.position.tolist() == [read + LONG, LONG]


@every_layer
def test_a_row_waits_at_a_boundary_while_others_read(name):
    layer, x = build(name), tokens(2, LONG)
    waiting, mask = torch.zeros(2, 3 * LONG, DIM, dtype=x.dtype), torch.zeros(2, 3 * LONG, dtype=torch.bool)
    places = torch.arange(LONG) + torch.arange(LONG) // SEGMENT * 9  # pads where a segment of the second row has ended
    waiting[0, :LONG], mask[0, :LONG] = x[0], True
    waiting[1, places], mask[1, places] = x[1], True
    expected = run(layer, x)[0]
    for cuts in (), range(4, 3 * LONG, 4):
        output = run(layer, waiting, cuts, mask=mask)[0]
        close(output[mask], expected.flatten(0, 1))


@every_layer
def test_rows_never_see_one_another(name):
    layer, x = build(name), tokens(2, LONG)
    other = x.clone()
    other[1] = 100 * tokens(1, LONG, seed=4)[0]
    close(run(layer, other)[0][0], run(layer, x)[0][0])


@every_layer
def test_no_token_sees_a_later_one(name):
    layer, x = build(name), tokens(1, LONG)
    later = x.clone()
    later[:, 20:] += 1
    changed = (run(layer, x)[0] - run(layer, later)[0]).abs().amax(dim=(0, 2)) > 0
    assert changed.tolist() == [False] * 20 + [True] * (LONG - 20)


@every_layer
@pytest.mark.parametrize("read", [0, SEGMENT, 3 * SEGMENT + 1], ids=["empty", "one segment", "full"])
def test_gradients_are_those_of_finite_differences(name, read):
    layer = build(name)
    memory = run(layer, tokens(2, read))[1]
    state = memory.state_dict()
    start, mask = torch.tensor([False, True]), torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def output(x, *values):
        fresh = type(memory).from_state_dict(state)
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, given, (x, fresh, start, mask))[0]

    x = tokens(2, 5, seed=5)
    x[0] *= 1e-2
    assert torch.autograd.gradcheck(
        output, (x.requires_grad_(), *parameters), eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True
    )


@every_layer
@pytest.mark.parametrize("situation", ["empty", "full", "cleared", "masked", "zeros", "huge"])
def test_gradients_are_finite(name, situation):
    layer, x = build(name), tokens(2, SEGMENT, seed=6)
    memory = None if situation == "empty" else run(layer, tokens(2, LONG - 2))[1]
    start = torch.tensor([situation == "cleared"] * 2)
    mask = torch.full((2, SEGMENT), situation != "masked")
    x = {"zeros": 0 * x, "huge": 1e4 * x}.get(situation, x).requires_grad_()
    output, memory = layer(x, memory, start, mask)
    output, _ = layer(x, memory)
    output.square().sum().backward()
    assert torch.isfinite(output).all()
    for gradient in (x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)):
        assert torch.isfinite(gradient).all()


@every_layer
def test_checkpointed_gradients_are_the_same_and_memory_steps_once(name):
    x = tokens(2, 4 * SEGMENT)

    def train(call):
        layer, memory, gradients = build(name), None, []
        for segment in x.split(SEGMENT, dim=1):
            output, memory = call(layer, segment, memory)
            layer.zero_grad()
            output.square().sum().backward()
            gradients += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        return output, gradients, memory.state_dict()

    plain = train(lambda layer, *args: layer(*args))
    again = train(functools.partial(checkpoint, use_reentrant=False))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.slow
@every_layer
@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"
)  # array-api-compat's
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
    layer, x = build(name), tokens(2, 4 * SEGMENT)
    torch.compiler.reset()  # each layer has the whole allowance of recompilations
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    memory = expected_memory = None
    for i, segment in enumerate(x.split(SEGMENT, dim=1)):
        start = torch.tensor([False, i == 2])
        memory = layer.memory(2) if memory is None else memory
        output, memory = compiled(segment, memory, start)
        expected, expected_memory = layer(segment, expected_memory, start)
        close(output, expected)
        gradients = [
            torch.autograd.grad(o.square().sum(), list(layer.parameters()), allow_unused=True, materialize_grads=True)
            for o in (output, expected)
        ]
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(memory.state_dict(), expected_memory.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memorizing", "memorizing, joint"])
@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"
)  # array-api-compat's
def test_autocast_compiles_into_one_graph(name):
    torch._dynamo.reset()
    layer, x = build(name).float(), tokens(2, 2 * SEGMENT).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    memory = layer.memory(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = layer(x)
        outputs = []
        for segment in x.split(SEGMENT, dim=1):
            output, memory = compiled(segment, memory)
            outputs.append(output)
    assert output.dtype == torch.bfloat16
    close(torch.cat(outputs, dim=1), expected, 1e-2)


@pytest.mark.slow
@every_layer
@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"
)  # array-api-compat's
def test_padded_rows_compile_into_one_graph(name):
    torch._dynamo.reset()
    layer, x = build(name), tokens(2, 4 * SEGMENT)
    mask = torch.arange(4 * SEGMENT) >= torch.tensor([[0], [SEGMENT - 2]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    memory = layer.memory(2)
    expected, expected_memory = run(layer, x, mask=mask)
    outputs = []
    for segment, present in zip(x.split(4, dim=1), mask.split(4, dim=1), strict=True):
        output, memory = compiled(segment, memory, mask=present)
        outputs.append(output)
    close(torch.cat(outputs, dim=1), expected)
    following = tokens(2, 2 * SEGMENT, seed=9)
    close(layer(following, memory)[0], layer(following, expected_memory)[0])


@every_layer
def test_copies_of_a_memory_go_their_own_way(name):
    layer, x = build(name), tokens(2, LONG)
    _, memory = run(layer, x)
    copied, swapped = copy.deepcopy(memory), memory.select([1, 0, 1])
    following = tokens(2, 2 * SEGMENT, seed=7)
    expected, _ = run(layer, following, memory=memory)
    run(layer, -following, memory=copied)
    again, _ = run(layer, following[[1, 0, 1]], memory=swapped)
    close(again, expected[[1, 0, 1]])


@every_layer
def test_rows_that_are_joined_go_on_as_they_were(name):
    layer, x = build(name), tokens(3, LONG)
    following = tokens(3, 2 * SEGMENT, seed=8)
    one, _ = layer(following, run(layer, x)[1])
    _, first = run(layer, x[:2])
    _, last = run(layer, x[2:])
    close(layer(following, type(first).join([first, last]))[0], one)
    _, early = run(layer, x[2:, :7])  # at another distance from its next boundary
    other, _ = layer(following[2:], type(first).join([early]))
    both, _ = layer(following, type(first).join([first.select([1, 0]), early]))
    close(both[2:], other)
    close(both[:2], layer(following[:2], first.select([1, 0]))[0])
    for states in [], [first, layer]:
        with pytest.raises(ArgumentError, match="states"):
            type(first).join(states)


@every_layer
def test_a_saved_memory_continues_bit_by_bit(name, tmp_path):
    layer, x = build(name), tokens(2, LONG)
    _, memory = run(layer, x)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    loaded = type(memory).from_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    following = tokens(2, 2 * SEGMENT, seed=8)
    (a, after), (b, also) = (run(layer, following, memory=m) for m in (memory, loaded))
    torch.testing.assert_close((a, after.state_dict()), (b, also.state_dict()), rtol=0, atol=0)


@every_layer
def test_a_pickled_memory_goes_its_own_way(name):
    layer, x, following = build(name), tokens(2, LONG), tokens(2, LONG, seed=3)
    _, memory = run(layer, x)
    copied = pickle.loads(pickle.dumps(memory))
    expected = layer(following, memory)[0]
    run(layer, tokens(2, LONG, seed=4), memory=layer.memory(2))
    close(layer(following, copied)[0], expected, 0)


@pytest.mark.parametrize("name", [name for name in BUILD if name.startswith(("compressive", "continuous"))])
def test_losses_depend_on_the_tokens_read_and_not_on_cuts_or_padding(name):
    layer, n = build(name), 3 * SEGMENT
    x, padding = tokens(2, n), 2 * SEGMENT + 1
    before, x = layer(x)[1], tokens(2, n, seed=2)
    expected = layer(x, before)[1].loss
    if expected is None:
        assert not list(getattr(layer, "compressor", []))
        return
    mask = (torch.arange(padding + n) >= padding).expand(2, -1)
    padded = torch.cat([torch.zeros(2, padding, DIM, dtype=x.dtype), x], dim=1)
    close(layer(padded, before, mask=mask)[1].loss, expected)
    apart, column = padded.new_zeros(2, 2 * n, DIM), torch.arange(n)
    apart[0, 2 * column], apart[1, 2 * column + 1] = x[0], x[1]  # the rows by turns
    mask = torch.stack([torch.arange(2 * n) % 2 == 0, torch.arange(2 * n) % 2 == 1])
    close(layer(apart, before, mask=mask)[1].loss, expected)
    losses, memory = [], before
    for token in x.split(1, dim=1):
        _, memory = layer(token, memory)
        losses.append(memory.loss)
    losses = [loss for loss in losses if loss is not None]
    close(sum(losses) / len(losses), expected)


@every_layer
def test_a_layer_holds_parameters_only(name):
    layer = build(name)
    run(layer, tokens(2, LONG))
    assert not list(layer.buffers())
    assert set(layer.state_dict()) == {n for n, _ in layer.named_parameters()}
    _, memory = run(layer, tokens(2, LONG))
    before = memory.state_dict()
    layer.load_state_dict(build(name).half().double().state_dict())
    layer.half().double()
    torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)
    layer.load_state_dict(build(name).state_dict())
    copied = copy.deepcopy(layer)
    close(copied(tokens(1, 4))[0], layer(tokens(1, 4))[0])


@every_layer
def test_memory_has_no_graph_and_counts_its_bytes(name):
    layer = build(name)
    _, memory = layer(tokens(2, LONG).requires_grad_())
    assert not any(t.requires_grad for t in memory.tensors().values())
    assert memory.nbytes >= sum(t.nbytes for t in memory.tensors().values())
    assert memory.rows == 2


@every_layer
def test_evaluation_and_training_read_alike(name):
    layer, x = build(name), tokens(2, LONG)
    expected = run(layer, x)[0]
    with torch.inference_mode():
        close(run(layer.eval(), x, (SEGMENT, 8))[0], expected)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    layer, x = build(name), tokens(2, LONG)
    expected = run(layer, x)[0]
    output, memory = run(layer.to(dtype), x.to(dtype), (SEGMENT, SEGMENT + 3))
    assert output.dtype == dtype
    assert {t.dtype for t in memory.tensors().values() if t.is_floating_point()} <= {dtype, torch.float32}
    assert (output.double() - expected).abs().mean() < 0.1 * expected.abs().mean()


@every_layer
def test_a_memory_serves_a_layer_that_changed_its_dtype(name):
    layer, following = build(name), tokens(2, 2 * SEGMENT, seed=7)
    _, memory = run(layer, tokens(2, LONG))
    expected, _ = layer(following, copy.deepcopy(memory))
    output, after = layer.float()(following.float(), memory)
    assert output.dtype == torch.float32
    close(output.double(), expected, 1e-3)
    assert layer(following.float(), after)[0].dtype == torch.float32


@every_layer
def test_autocast(name):
    layer, x = build(name).float(), tokens(2, LONG).float()
    expected = run(layer, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, memory = run(layer, x, (SEGMENT, SEGMENT + 3))
    assert output.dtype == torch.bfloat16
    assert {t.dtype for t in memory.tensors().values() if t.is_floating_point()} == {torch.float32}
    assert (output.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    output.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@every_layer
def test_wrong_arguments_are_named(name):
    layer, x = build(name), tokens(2, 4)
    _, memory = layer(x)
    before = memory.state_dict()
    other = MISFIT[name.partition(",")[0]]().double()
    for error, argument, call in [
        (FrameworkError, "x", lambda: layer(x.numpy())),
        (DTypeError, "x", lambda: layer(x.long())),
        (DTypeError, "x", lambda: layer(x.float())),
        (ShapeError, "x", lambda: layer(x[..., :-1])),
        (ShapeError, "x", lambda: layer(x[0])),
        (ArgumentError, "memory", lambda: layer(x, [memory])),
        (ShapeError, "memory", lambda: layer(x[:1], memory)),
        (ShapeError, "memory", lambda: other(x, memory)),
        (FrameworkError, "x", lambda: layer(x.to("meta"), memory)),
        (FrameworkError, "memory", lambda: memory.fits(x.to("meta"), layer.settings, layer._shapes())),
        (ShapeError, "start", lambda: layer(x, memory, start=torch.tensor([True]))),
        (DTypeError, "start", lambda: layer(x, memory, start=torch.tensor([1, 0]))),
        (ShapeError, "mask", lambda: layer(x, memory, mask=torch.ones(2, 4, 4, dtype=torch.bool))),
        (DTypeError, "mask", lambda: layer(x, memory, mask=torch.ones(2, 4))),
        (ArgumentError, "rows", lambda: memory.select([2])),
        (ArgumentError, "state", lambda: type(memory).from_state_dict({})),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert caught.value.argument.startswith(argument)
    torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [TransformerXLAttention, MemorizingAttention])
def test_token_by_token_compiles_into_few_graphs(kind):
    torch._dynamo.reset()
    options = {"capacity": 30, "k": 3} if kind is MemorizingAttention else {}
    layer, x = kind(DIM, HEADS, segment=16, window=4, **options), tokens(1, 40).float()
    compiled, memory, outputs = torch.compile(layer, fullgraph=True, backend="aot_eager"), layer.memory(1), []
    for token in x.split(1, dim=1):  # more phases than PyTorch allows graphs
        output, memory = compiled(token, memory)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x)[0])


@every_layer
def test_a_memory_moves_with_its_numbers(name):
    layer, x = build(name), tokens(2, 2 * SEGMENT)
    _, memory = run(layer, x)
    moved = memory.to("cpu")
    assert all(tensor.device.type == "meta" for tensor in memory.to("meta").tensors().values())
    close(layer(x, moved)[0], layer(x, memory)[0])
    wrong = memory.following(position=memory.position.double())
    with pytest.raises(DTypeError, match=r"memory\.position"):
        layer(x, wrong)


@pytest.mark.parametrize(
    ("kind", "one", "other", "said"),
    [
        (MemorizingAttention, {"segment": 6, "window": 4}, {"segment": 4, "window": 6}, "segment=4, window=6"),
        (MemorizingAttention, {"window": 4, "overlap": True}, {"window": 4, "overlap": False}, "overlap=False"),
        (MemorizingAttention, {"capacity": 20}, {"capacity": 40}, "capacity=40"),
        (MemorizingAttention, {"dtype": "float16"}, {"dtype": "float32"}, "dtype='float32'"),
        (MemorizingAttention, {"normalize": True}, {"normalize": False}, "normalize=False"),
        (ContinuousAttention, {"gated": True}, {"gated": False}, "gated=False"),
        (TransformerXLAttention, {"segment": 6, "window": 8}, {"segment": 8, "window": 6}, "window=6"),
        (CompressiveAttention, {"segment": 6, "window": 12}, {"segment": 12, "window": 6}, "segment=12"),
        (CompressiveAttention, {"rate": 2}, {"rate": 3}, "rate=3"),
        (CompressiveAttention, {"method": "mean"}, {"method": "max"}, "method='max'"),
        (ContinuousAttention, {"window": 1}, {"window": 1, "basis": gaussian_basis(16, [0.1])}, "basis="),
    ],
)
def test_the_memory_of_a_layer_of_other_settings_is_refused(kind, one, other, said):
    usual = {
        MemorizingAttention: {"capacity": 20, "segment": SEGMENT},
        TransformerXLAttention: {},
        CompressiveAttention: {"segment": SEGMENT, "window": SEGMENT, "compressed": 4, "rate": 2},
        ContinuousAttention: {"segment": SEGMENT, "basis": 16, "samples": 12},
    }[kind]
    one, other = (kind(DIM, HEADS, **{**usual, **options}) for options in (one, other))
    x = tokens(2, 4).float()
    _, memory = one(x)
    with pytest.raises(ArgumentError, match=said) as caught:
        other(x, memory)
    assert caught.value.argument == "memory"
    with pytest.raises(ArgumentError):
        type(memory).join([memory, other(x)[1]])


@every_layer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_remembered(name, bad):
    layer, x = build(name), tokens(2, LONG)
    _, memory = run(layer, x, (2, 4))
    expected, _ = layer(x, copy.deepcopy(memory))
    spoilt = x.clone()
    spoilt[1, 3 * SEGMENT] = bad
    with pytest.raises(NonFiniteError, match="x"):
        layer(spoilt, memory)
    close(layer(x, memory)[0], expected, 0)


@every_layer
def test_nothing_of_an_old_document_reaches_the_one_that_starts(name):
    layer, x = build(name), tokens(2, 2 * SEGMENT + 1)
    _, memory = layer(x)
    spoilt = {  # what a GPU, which nobody waits for, may have let in
        key: tensor.index_fill(0, torch.tensor([0]), torch.nan)
        for key, tensor in memory.tensors().items()
        if tensor.is_floating_point()
    }
    start = torch.tensor([True, False])
    output, _ = layer(x, memory.following(**spoilt), start)
    close(output[:1], layer(x[:1])[0])


MISFIT = {  # layers whose memory does not fit the ones under test
    "memorizing": lambda: MemorizingAttention(DIM, HEADS, capacity=20, k=3, segment=SEGMENT + 1),
    "transformer-xl": lambda: TransformerXLAttention(DIM, HEADS, segment=SEGMENT, window=9),
    "compressive": lambda: CompressiveAttention(DIM, HEADS, segment=SEGMENT, window=SEGMENT, compressed=7, rate=2),
    "continuous": lambda: ContinuousAttention(DIM, HEADS, segment=SEGMENT, basis=18, samples=12),
}
