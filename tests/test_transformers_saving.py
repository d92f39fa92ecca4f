"""What an attached model keeps: its memory in a file, its gates and scales in another, and how they are trained."""

from __future__ import annotations

import dataclasses

import numpy as np
import perdure.bindings.transformers as bindings
import pytest
import torch
import transformers
from decoders import LLAMA, Letters, attach, generated, gpt2, in_windows, llama, logits, stored
from perdure.bindings.transformers import detach

import perdure


class Reversed(Letters):
    """Another tokenizer."""

    def __call__(self, text, **_):
        return {"input_ids": super().__call__(text)["input_ids"][::-1]}


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[llama, gpt2])
def build(request):
    return request.param


def checkpoint(model):
    """Let the model compute its activations again in the backward pass; the method has two names over the versions."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


# ---- memory ---------------------------------------------------------------------------------------------------------

SETTINGS = [
    {"positions": "true"},
    {"positions": "clamped", "distance": 9, "recent": 4, "capacity": 20},
    {"positions": "constant", "layers": [1]},
    {"recent": 6, "layers": [0], "mixing": "gate", "sinks": 0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_saved_memory_goes_on_bit_for_bit(build, ids, settings, tmp_path):
    question, more = ids[:, 30:36], ids[:, 36:]
    memory = attach(build(), tokenizer=Letters(), k=5, window=8, **settings)
    memory.read_document(ids[:, :30], progress=False)
    memory.save(tmp_path / "memory")
    expected = [generated(memory.model, question), in_windows(memory.model, more, 2)]
    again = attach(build(), tokenizer=Letters(), k=5, window=8, **settings)
    again.read_document(more[:1], progress=False)
    again.load(tmp_path / "memory")
    assert again.tokens.tolist() == [len(ids[0, :30]) if "capacity" not in settings else 24] * 2
    assert [row.tolist() for row in again.history] == ids[:, :30].tolist()
    assert torch.equal(generated(again.model, question), expected[0])
    assert torch.equal(in_windows(again.model, more, 2), expected[1])
    assert all(np.array_equal(a, stored(again)[n]) for n, a in stored(memory).items())


def homes(memory):
    return {store.device for layer in memory.layers.values() for store in layer.stores.values()}


@pytest.mark.parametrize("device_capacity", [None, 5])
def test_memory_on_a_device_answers_and_is_saved_alike(ids, device_capacity, tmp_path):
    """PyTorch's CPU as the device: other stores, another search, the same numbers."""
    common = {"k": 5, "window": 8, "distance": 9, "recent": 4, "capacity": 20}
    common |= {"index": "exact"} if device_capacity is None else {}  # "auto" also keeps what it chooses by
    there = {"device": "cpu", "device_capacity": device_capacity}
    ours, theirs = (attach(llama(), tokenizer=Letters(), **common, **more) for more in ({}, there))
    for memory, name in ((ours, "host"), (theirs, "there")):
        memory.read_document(ids[:, :30], progress=False)
        memory.save(tmp_path / name)
    assert homes(theirs) == {torch.device("cpu")}
    for i, layer in ours.layers.items():  # readings are rounded otherwise there, and so is what the next layer keeps
        for name, store in layer.stores.items():
            held, there = store.state_dict(), theirs.layers[i].stores[name].state_dict()
            for part in ("rows.0.keys", "rows.0.values", "written"):
                np.testing.assert_allclose(held[part], there[part], atol=1e-5)
    with ours.frozen(), theirs.frozen():
        torch.testing.assert_close(logits(theirs.model, ids[:, 30:]), logits(ours.model, ids[:, 30:]))
    theirs.load(tmp_path / "host")
    assert homes(theirs) == {torch.device("cpu")}
    with pytest.raises(perdure.ArgumentError, match="index"):
        attach(llama(), device="cpu", index="ivf")


def test_an_empty_memory_can_be_saved(build, ids, tmp_path):
    memory = attach(build())
    memory.save(tmp_path / "memory")
    memory.read_document(ids, progress=False)
    memory.load(tmp_path / "memory")
    assert memory.tokens.tolist() == []
    assert torch.equal(logits(memory.model, ids), logits(build(), ids))


def test_what_waits_for_a_backward_pass_is_saved_too(ids, tmp_path):
    model = llama()
    memory = attach(model.train())
    checkpoint(model)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert memory.tokens.tolist() == []
    memory.save(tmp_path / "memory")
    memory.load(tmp_path / "memory")
    assert memory.tokens.tolist() == [40, 40]


def refused(memory, path, error, match):
    """The load is refused, and nothing has changed."""
    before = stored(memory)
    with pytest.raises(error, match=match):
        memory.load(path)
    after = stored(memory)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_memory_is_loaded_only_where_it_means_something(ids, tmp_path):
    file = tmp_path / "memory"
    memory = attach(llama(), tokenizer=Letters())
    memory.read_document(ids, progress=False)
    memory.save(file)

    def attached(model=None, **settings):
        other = attach(model or llama(), **settings)
        other.read_document(ids[:1, :7], progress=False)
        return other

    refused(attached(tokenizer=Reversed()), file, perdure.ArgumentError, "^tokenizer: expected the tokenizer that")
    attached(tokenizer=None).load(file)
    strange = llama()
    with torch.no_grad():
        strange.model.layers[2].self_attn.v_proj.weight.mul_(1.5)
    refused(attached(strange), file, perdure.ArgumentError, "^model: expected the model that .* other weights")
    for settings in ({"rms_norm_eps": 1e-2}, {"hidden_act": "gelu"}, {"sliding_window": 7}):
        told = rf"^model: expected the model that .* other settings \({next(iter(settings))}\)"
        refused(attached(llama(**settings)), file, perdure.ArgumentError, told)
    moved = llama()
    with torch.no_grad():
        moved.model.embed_tokens.weight.mul_(1.01)
    refused(attached(moved), file, perdure.ArgumentError, "^model: expected the model that .* other weights")
    attached(llama().to(torch.float16)).load(file)
    drawn_anew = llama()
    with torch.no_grad():
        drawn_anew.model.layers[0].mlp.up_proj.weight.normal_()
    refused(attached(drawn_anew), file, perdure.ArgumentError, "^model: expected the model that .* other weights")
    turned = {"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}
    for rope in turned:
        other = llama(rope_parameters=rope)
        refused(attached(other), file, perdure.ArgumentError, "^model: expected the model that .* turns keys otherwise")
    refused(attached(llama(head_dim=16)), file, perdure.ArgumentError, "^model: expected the model")
    attached(llama().to(torch.bfloat16)).load(file)  # the same weights, in half precision
    for name, value in {"capacity": 9, "sinks": 2, "layers": [1], "positions": "true", "index": "ivf"}.items():
        refused(attached(**{name: value}), file, perdure.ArgumentError, f"^{name}: expected .* saved with")


def test_other_files_are_refused(ids, tmp_path):
    memory = attach(llama())
    memory.read_document(ids, progress=False)
    memory.save(tmp_path / "whole")
    with pytest.raises(perdure.FileError, match="expected a saved memory"):
        perdure.load(tmp_path / "whole")
    content = bytearray((tmp_path / "whole").read_bytes())
    content[-5] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    refused(memory, tmp_path / "damaged", perdure.FileError, "checksum")
    perdure.KNNMemory(rows=1, heads=1, dim=2, capacity=3).save(tmp_path / "single")
    refused(memory, tmp_path / "single", perdure.FileError, "expected the memory of a model, got that of a KNNMemory")
    refused(memory, tmp_path / "missing", perdure.FileError, "nothing there")


# ---- gates and scales -----------------------------------------------------------------------------------------------


def learned(memory, seed=0):
    """Gates and scales as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator))


def test_gates_and_scales_are_a_small_file_of_their_own(build, ids, tmp_path):
    memory = attach(build(), mixing="gate", layers=[1, -1])
    plain = in_windows(memory.model, ids, 10)
    learned(memory)
    memory.clear()
    expected = in_windows(memory.model, ids, 10)
    assert not torch.allclose(plain, expected)
    memory.save_adapter(tmp_path / "adapter.safetensors")
    assert (tmp_path / "adapter.safetensors").stat().st_size < 1000
    memory.model.save_pretrained(tmp_path / "model")
    reloaded = type(memory.model).from_pretrained(tmp_path / "model").eval()
    assert not any("perdure" in name for name in reloaded.state_dict())
    again = attach(reloaded, mixing="gate", layers=[1, -1])
    again.load_adapter(tmp_path / "adapter.safetensors")
    assert torch.equal(in_windows(reloaded, ids, 10), expected)


def test_a_scale_scales_what_memory_is_asked(ids):
    model = llama(num_hidden_layers=1)
    memory = attach(model, mixing="gate", sinks=0, k=64)
    layer = model.model.layers[0].self_attn
    logits(model, ids)
    with torch.no_grad(), memory.frozen():
        layer.perdure_gate.fill_(30.0)  # memory alone
        layer.perdure_scale.fill_(-1e-6)  # at no temperature: the mean of what is found, whatever its sign
        first = logits(model, ids[:, :1])
        layer.perdure_scale.fill_(1e-6)
        assert torch.equal(logits(model, ids[:, :1]), first)
        layer.perdure_scale.fill_(1.0)
        assert not torch.allclose(logits(model, ids[:, :1]), first)


def test_adapters_of_others_are_refused(ids, tmp_path):
    file = tmp_path / "adapter"
    memory = attach(llama(), mixing="gate", layers=[0, 2])
    memory.save_adapter(file)
    for call in (memory.parameters, lambda: memory.save_adapter(file), lambda: memory.load_adapter(file)):
        call()
    joint = attach(llama())
    for call in (joint.parameters, lambda: joint.save_adapter(file), lambda: joint.load_adapter(file)):
        with pytest.raises(perdure.ArgumentError, match="mixing: expected 'gate', got 'joint'"):
            call()
    other = attach(llama(), mixing="gate")
    with pytest.raises(perdure.ArgumentError, match=r"layers: expected \[0, 2\], as the adapter has, got \[0, 1, 2\]"):
        other.load_adapter(file)
    memory.model.save_pretrained(tmp_path / "model")
    for wrong in (tmp_path / "model" / "model.safetensors", tmp_path / "missing", tmp_path):
        with pytest.raises(perdure.FileError):
            other.load_adapter(wrong)
    (tmp_path / "text").write_text("no adapter")
    with pytest.raises(perdure.FileError, match="expected an adapter"):
        other.load_adapter(tmp_path / "text")
    assert all(bool((p == p[0]).all()) for p in other.parameters())


# ---- training -------------------------------------------------------------------------------------------------------


class Segments(torch.utils.data.Dataset):
    """Two documents, a segment at a time, side by side in every batch; both repeat one sentence."""

    def __init__(self, steps):
        sentence = torch.randint(0, 61, (24,), generator=torch.Generator().manual_seed(2))
        self.rows = [sentence.roll(9 * row).repeat(steps).split(12)[:steps] for row in range(2)]

    def __len__(self):
        return 2 * len(self.rows[0])

    def __getitem__(self, i):
        segment = self.rows[i % 2][i // 2]
        return {"input_ids": segment, "labels": segment}


class Evaluated(Segments):
    """Two batches of four rows of sevens."""

    def __init__(self, segments):
        self.rows = [[torch.full((12,), 7)] * (segments // 2)] * 2


FIELDS = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
ORDER = {"train_sampling_strategy": "sequential"} if "train_sampling_strategy" in FIELDS else {}  # 5.0 has none


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gates_are_fine_tuned_with_trainer(checkpointing, tmp_path):
    model = llama()
    memory = attach(model, mixing="gate", k=8, sinks=0)
    weights = {n: p.clone() for n, p in model.named_parameters() if "perdure" not in n}
    before = [p.clone() for p in memory.parameters()]
    model.requires_grad_(False)
    for parameter in memory.parameters():
        parameter.requires_grad_(True)
    if checkpointing:
        model.enable_input_require_grads()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=6, learning_rate=0.05, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, gradient_checkpointing=checkpointing, disable_tqdm=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, seed=0, dataloader_pin_memory=False,
        eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=4, **ORDER,
    )  # fmt: skip

    class Trainer(transformers.Trainer):  # as documented
        def evaluate(self, *args, **settings):
            memory.save(tmp_path / "training.memory")
            memory.clear()
            try:
                return super().evaluate(*args, **settings)
            finally:
                evaluated.append([row.tolist() for row in memory.history])
                memory.load(tmp_path / "training.memory")

    evaluated = []
    trainer = Trainer(model=model, args=arguments, train_dataset=Segments(6), eval_dataset=Evaluated(8))
    if not ORDER:
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    memory.settle()
    assert memory.tokens.tolist() == [72, 72]
    documents = [torch.cat(row).tolist() for row in Segments(6).rows]
    assert [row.tolist() for row in memory.history] == documents
    assert evaluated == [[[7] * 24] * 4] * 2
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert all(bool((p != old).any()) for p, old in zip(memory.parameters(), before, strict=True))
    assert all(bool(p.isfinite().all()) for p in memory.parameters())


def test_checkpointing_trains_to_the_same_gates():
    trained = []
    for checkpointing in (False, True):
        model = llama().train()
        memory = attach(model, mixing="gate", k=8)
        if checkpointing:
            checkpoint(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        data = Segments(4)
        for step in range(4):
            ids = torch.stack([data[2 * step + row]["input_ids"] for row in range(2)])
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(torch.cat([p.detach() for p in memory.parameters()]))
    torch.testing.assert_close(*trained)
    assert bool((trained[0] != trained[0].round()).any())


def test_a_batch_of_another_size_is_refused_while_training(ids):
    model = llama().train()
    attach(model, mixing="gate")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with pytest.raises(perdure.ShapeError, match=r"input_ids: expected 2 rows, as the memory has, got 1\..*clear"):
        model(input_ids=ids[:1], labels=ids[:1], use_cache=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mixing", ["joint", "gate"])
def test_a_compiled_model_computes_the_same(mixing, ids):
    model = llama()
    memory = attach(model, mixing=mixing, k=6, recent=5)
    expected = in_windows(model, ids, 10)
    memory.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(in_windows(compiled, ids, 10), expected)
    assert memory.tokens.tolist() == [40, 40]
    memory.clear()
    model.train()
    gradients = []
    for called in (model, compiled):
        memory.clear()
        model.zero_grad()
        for part in ids.chunk(2, dim=1):
            called(input_ids=part, labels=part, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


# ---- versions -------------------------------------------------------------------------------------------------------


def test_older_transformers_are_refused_with_what_to_install():
    bindings._check_version(transformers.__version__)
    bindings._check_version("5.0.0")
    with pytest.raises(
        perdure.BackendError, match=r"transformers: expected version 5\.0 or newer, below 6\.0, got 4\.57\.6.*pip"
    ):
        bindings._check_version("4.57.6")
    with pytest.raises(perdure.BackendError, match=r"newer, below 6\.0, got 6\.0\.0"):
        bindings._check_version("6.0.0")


def test_settings_of_the_decoder_are_what_they_seem():
    assert LLAMA["num_key_value_heads"] < LLAMA["num_attention_heads"]
    model = llama()
    attach(model, mixing="gate")
    names = {name for name, _ in model.named_parameters() if "perdure" in name}
    assert len(names) == 6
    detach(model)
    assert not any("perdure" in name for name, _ in model.named_parameters())
