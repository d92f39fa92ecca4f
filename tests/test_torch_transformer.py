"""MemoryTransformer, and the training loop of the documentation."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from perdure.bindings.torch import MemorizingAttention, MemoryTransformer, TransformerXLAttention

from perdure import ArgumentError, DTypeError, FrameworkError, ShapeError

SEGMENT = 6


def build(**options):
    torch.manual_seed(0)
    local = {"dim": 16, "heads": 2, "segment": SEGMENT, "window": 4}
    memorizing = MemorizingAttention(**local, capacity=30, k=4, positions="t5", dtype="float64")
    return MemoryTransformer(11, [TransformerXLAttention(**local), memorizing], **options).double()


def words(rows, n):
    return torch.randint(11, (rows, n), generator=torch.Generator().manual_seed(1))


def test_how_calls_are_cut_changes_nothing():
    model, x = build(), words(2, 40)
    expected, _ = model(x)
    memory, parts = None, []
    for part in x.split(7, dim=1):
        logits, memory = model(part, memory)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_left_padding_changes_nothing():
    model, x = build(), words(1, 20)
    expected, _ = model(x)
    padded = torch.cat([words(1, 5), x], dim=1)
    mask = torch.arange(25)[None] >= 5
    torch.testing.assert_close(model(padded, mask=mask)[0][:, 5:], expected)


def test_padding_may_be_any_token():
    model, mask = build(), torch.arange(9) < torch.tensor([[9], [5]])
    expected, _ = model(words(2, 9), mask=mask)
    given, _ = model(torch.where(mask, words(2, 9), -100), mask=mask)
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_checkpointing_trains_alike():
    gradients = []
    for checkpointing in (False, True):
        model = build(checkpointing=checkpointing, dropout=0.2)
        torch.manual_seed(5)
        memory = model.memory(2)
        for part in words(2, 4 * SEGMENT).split(SEGMENT, dim=1):
            logits, memory = model(part, memory)
            logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_no_layer_has_read_where_the_memory_of_a_later_one_is_refused():
    model, x = MemoryTransformer(11, reversed([block.attention for block in build().blocks])).double(), words(2, 20)
    _, memory = model(x)
    expected, _ = model(x, copy.deepcopy(memory))
    with pytest.raises(ShapeError, match="rows"):
        model(x, (memory[0], memory[1].select([0])))
    torch.testing.assert_close(model(x, memory)[0], expected, rtol=0, atol=0)


def test_a_saved_memory_continues_bit_by_bit():
    model = build()
    _, memory = model(words(2, 40))
    copied = model.memory_from_state_dict(model.memory_state_dict(memory))
    (a, _), (b, _) = (model(words(2, 9), m) for m in (memory, copied))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (FrameworkError, "tokens", lambda m: m([[1, 2]])),
        (DTypeError, "tokens", lambda m: m(torch.zeros(1, 3))),
        (ShapeError, "tokens", lambda m: m(torch.zeros(3, dtype=torch.long))),
        (ArgumentError, "tokens", lambda m: m(words(1, 3) + 11)),
        (ArgumentError, "tokens", lambda m: m(-1 - words(1, 3))),
        (ArgumentError, "memory", lambda m: m(words(1, 3), m.memory(1)[:1])),
        (ArgumentError, "memory", lambda m: m(words(1, 3), m.memory(1)[1])),
        (ArgumentError, "layers", lambda m: MemoryTransformer(11, [])),
        (ArgumentError, "layers", lambda m: MemoryTransformer(11, [torch.nn.Linear(2, 2)])),
        (ArgumentError, "dropout", lambda m: MemoryTransformer(11, [block.attention for block in m.blocks], dropout=2)),
        (ArgumentError, "state", lambda m: m.memory_from_state_dict({"7.position": torch.zeros(1)})),
        (ArgumentError, "state", lambda m: m.memory_from_state_dict(3)),
        (ArgumentError, "layers", lambda m: MemoryTransformer(11, m.blocks[0].attention)),
        (ArgumentError, "checkpointing", lambda m: build(checkpointing="no")),
    ],
)
def test_wrong_arguments_are_named(error, argument, call):
    with pytest.raises(error) as caught:
        call(build())
    assert caught.value.argument == argument


def example():
    path = Path(__file__).parents[1] / "docs" / "examples" / "train_language_model.py"
    spec = importlib.util.spec_from_file_location("train_language_model", path)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_example_resumes_bit_by_bit(tmp_path, capsys):
    module = example()
    files = []
    for i, length in enumerate((90, 33, 200)):
        files.append(str(tmp_path / f"{i}.txt"))
        Path(files[-1]).write_bytes(bytes((7 * i + 3 * j * j) % 251 for j in range(length)))
    common = ["--rows", "2", "--segment", "16", "--every", "1"]
    whole = module.train(module.arguments([*common, "--steps", "4", "--checkpoint", str(tmp_path / "a.pt")]), files)
    at = ["--checkpoint", str(tmp_path / "b.pt")]
    first = module.train(module.arguments([*common, "--steps", "2", *at]), files)
    second = module.train(module.arguments([*common, "--steps", "4", *at]), files)
    assert first + second == whole
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["memory"], b["memory"], rtol=0, atol=0)
    assert "remembers" in capsys.readouterr().err
