"""What happens around an attached model: quantised layers, other models, other threads, calls that break off."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import pytest
import torch
import transformers
from decoders import EXACT, LLAMA, attach, generated, in_windows, llama, logits, seeded
from perdure.bindings.transformers import detach
from torch.utils.checkpoint import checkpoint

import perdure


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))


def small(**settings):
    return llama(num_hidden_layers=2, **settings)


# ---- quantised models -----------------------------------------------------------------------------------------------


class Packed(torch.nn.Module):
    """A linear layer whose weight is bytes, and which computes in another dtype, as those of 4 bits do."""

    def __init__(self, linear, factor=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
        self.unpacked = [factor * linear.weight.detach()]

    def forward(self, vectors):
        return torch.nn.functional.linear(vectors.float(), self.unpacked[0]).to(vectors.dtype)


def quantised(factor=1.0):
    model = small()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            made = Packed(getattr(layer.self_attn, name), factor if name == "k_proj" else 1.0)
            setattr(layer.self_attn, name, made)
    return model


@pytest.mark.parametrize("mixing", ["joint", "gate"])
def test_a_quantised_model_reads_as_the_same_weights_do(mixing, ids):
    read = []
    for model in (small(), quantised()):
        memory = attach(model, k=64, distance=10, window=8, mixing=mixing)
        assert all(layer.rotary is not None for layer in memory.layers.values())
        read.append(in_windows(model, ids, 8))
    torch.testing.assert_close(*read, **EXACT)


def wearing(model):
    """What `attach` could have left on a model."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return sorted(model.state_dict()), sorted(vars(model)), model.config._attn_implementation, hooks


def test_a_layer_whose_keys_are_zeros_tells_nothing_of_its_rotation():
    model = quantised(factor=0.0)
    before = wearing(model)
    with pytest.raises(perdure.ArgumentError, match="got LlamaModel, a layer of which gives keys of zeros"):
        attach(model)
    assert wearing(model) == before


def test_a_model_is_as_it_was_wherever_attaching_breaks_off(monkeypatch):
    model = small()
    before = wearing(model)
    for name in ("find_rotary", "LayerMemory", "hook"):
        monkeypatch.setattr(sys.modules[detach.__module__], name, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attach(model, mixing="gate")
        assert wearing(model) == before
        monkeypatch.undo()
    attach(model)


# ---- other attention, other models ----------------------------------------------------------------------------------


def test_attention_that_is_changed_under_a_memory_is_noticed(ids):
    model = small()
    memory = attach(model)
    logits(model, ids[:, :20])
    model.set_attn_implementation("eager")
    for call in (lambda: logits(model, ids), lambda: generated(model, ids)):
        with pytest.raises(perdure.ArgumentError, match=r"^model: expected .*'perdure_sdpa', as attached, got 'eager'"):
            call()
    assert memory.tokens.tolist() == [20, 20]
    detach(model)
    assert model.config._attn_implementation == "eager"


def test_models_of_one_configuration_have_memories_of_their_own(ids):
    config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 2})
    ours, theirs = (seeded(lambda: transformers.LlamaForCausalLM(config)) for _ in range(2))
    full = logits(ours, ids)
    settings = {"k": 64, "positions": "true", "window": 8}
    for model in (ours, theirs):
        attach(model, **settings)
        torch.testing.assert_close(in_windows(model, ids, 8), full, **EXACT)
    detach(theirs)
    assert torch.equal(logits(theirs, ids), full)
    ours.perdure_memory.clear()
    torch.testing.assert_close(in_windows(ours, ids, 8), full, **EXACT)
    with pytest.raises(perdure.ArgumentError, match=r"^model: expected a model without memory"):
        attach(ours.model)
    detach(ours)
    assert config._attn_implementation == "sdpa"


def test_a_memory_that_was_detached_reads_nothing(ids):
    model = small()
    memory = attach(model, mixing="gate")
    memory.read_document(ids, progress=False)
    detach(model)
    again = attach(model)
    calls = (
        lambda: memory.read_document(ids, progress=False),
        lambda: memory.frozen().__enter__(),
        lambda: memory.tracing().__enter__(),
        memory.parameters,
    )
    for call in calls:
        with pytest.raises(perdure.ArgumentError, match=r"^memory: expected that of a model it is attached to"):
            call()
    assert again.tokens.tolist() == []


def test_a_cache_that_memory_looks_after_needs_memory(ids):
    model = small()
    attach(model, window=8)
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        model(ids[:, 30:], past_key_values=copied)
        detach(model)
        for other in (cache, copied):
            with pytest.raises(perdure.ArgumentError, match=r"^past_key_values: expected a cache that began with"):
                model(ids[:, 30:], past_key_values=other)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, "/dev/null"), copy.deepcopy])
def test_models_with_memory_are_not_copied(write):
    model = small()
    memory = attach(model)
    for what in (model, memory):
        with pytest.raises(perdure.ArgumentError, match=r"^model: expected one without memory to .*detach\(model\)"):
            write(what)
    detach(model)
    write(model)


# ---- one forward pass at a time -------------------------------------------------------------------------------------


def test_threads_wait_for_one_another_or_are_told_to(ids):
    model = small()
    memory = attach(model, k=64, window=8)
    memory.read_document(ids[:, :20], progress=False)
    with memory.frozen():
        expected = logits(model, ids[:, 20:])
    inside, go, found = threading.Event(), threading.Event(), []

    def stop(*_):
        inside.set()
        assert go.wait(60)

    pausing = model.model.layers[1].register_forward_pre_hook(stop)
    other = threading.Thread(target=lambda: found.append(logits(model, ids[:, 20:])))
    with memory.frozen():
        other.start()
        assert inside.wait(60)
        for call in (lambda: logits(model, ids[:, :5]), lambda: generated(model, ids[:, :5])):
            with pytest.raises(perdure.ArgumentError, match=r"^model: expected one forward pass at a time, .*lock"):
                call()
        go.set()
        other.join()
        pausing.remove()
        assert torch.equal(found[0], expected)
        assert torch.equal(logits(model, ids[:, 20:]), expected)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])  # after the latter no hook is called
def test_a_pass_that_breaks_off_keeps_nobody_waiting(error, ids):
    model = small()
    memory = attach(model, tokenizer=object())
    found = []

    def broken(*_):
        raise error

    def attempt():
        failing = model.model.layers[1].register_forward_pre_hook(broken)
        with pytest.raises(error):
            logits(model, ids[:, :10])
        failing.remove()

    def elsewhere(call):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with memory.tracing() as trace:
        elsewhere(attempt)
        found.append(logits(model, ids[:, 10:20]))
        attempt()
        found.append(logits(model, ids[:, 20:30]))
    assert len(found) == 2
    assert memory.tokens.tolist() == [20, 20]
    assert trace.ids() == ids[0, 10:30].tolist()


def test_a_backward_pass_in_another_thread_computes_layers_again(ids):
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        memory = attach(model, k=6)
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(ids[:, :10], labels=ids[:, :10]).loss.backward()
        model.zero_grad()
        thread = threading.Thread(target=model(ids[:, 10:], labels=ids[:, 10:]).loss.backward)
        thread.start()
        thread.join()
        memory.settle()
        assert memory.tokens.tolist() == [40, 40]
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_a_model_that_a_backward_pass_calls_again_is_remembered_once(ids):
    model = small().train()
    memory = attach(model, k=6)
    loss = checkpoint(lambda part: model(part, labels=part).loss, ids[:, :10], use_reentrant=False)
    with pytest.raises(perdure.ArgumentError, match=r"^model: expected a forward pass that is remembered once, got"):
        loss.backward()
    assert memory.tokens.tolist() == [10, 10]
    gradients = []
    with memory.frozen():
        for call in (lambda f, x: checkpoint(f, x, use_reentrant=False), lambda f, x: f(x)):
            model.zero_grad()
            call(lambda part: model(part, labels=part).loss, ids[:, 10:]).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


# ---- what a rejected call leaves, and what a cleared one does -------------------------------------------------------


def test_clearing_rows_that_are_not_there_changes_nothing(ids):
    memory = attach(small())
    memory.clear([0])  # of nothing
    memory.read_document(ids[:, :20], progress=False)
    with torch.no_grad():
        cache = memory.model(ids[:, 20:30], use_cache=True).past_key_values
        for rows in ([7], [-1], [0, 0], "x", 1):
            with pytest.raises(perdure.ArgumentError, match=r"^rows: "):
                memory.clear(rows)
        memory.model(ids[:, 30:], past_key_values=cache)


def test_rows_of_what_waits_for_a_backward_pass_are_known(ids):
    model = small().train()
    memory = attach(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    loss = model(ids, labels=ids).loss
    with pytest.raises(perdure.ArgumentError, match=r"^rows: expected distinct rows below 2"):
        memory.clear([2])
    loss.backward()
    memory.clear()
    model(ids[:, :10], labels=ids[:, :10]).loss.backward()
    memory.clear([1])
    assert memory.tokens.tolist() == [10, 0]


def test_a_model_in_training_generates_without_checkpointing_only(ids):
    model = small().train()
    attach(model)
    assert generated(model, ids[:, :5]).shape == (2, 15)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with pytest.raises(perdure.ArgumentError, match=r"^past_key_values: expected no cache while training, .*eval\(\)"):
        generated(model, ids[:, :5])
    assert generated(model.eval(), ids[:, :5]).shape == (2, 15)


def test_a_capacity_of_a_device_needs_a_device():
    with pytest.raises(perdure.ArgumentError, match=r"^device_capacity: expected None without a device, got 4"):
        attach(small(), device_capacity=4)


def test_ids_of_what_was_read_take_eight_bytes_each(ids):
    memory = attach(small())
    memory.read_document(ids, progress=False)
    assert [history.itemsize * len(history) for history in memory.history] == [8 * 40] * 2
    assert [history.tolist() for history in memory.history] == ids.tolist()


def test_an_interrupted_thread_keeps_nobody_waiting(ids):
    model = small()
    memory = attach(model)
    found = []

    def interrupted(*_):
        raise KeyboardInterrupt

    failing = model.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids[:, :10])
    failing.remove()
    thread = threading.Thread(target=lambda: found.append(logits(model, ids[:, 10:20])))
    thread.start()
    thread.join()
    assert len(found) == 1
    assert memory.tokens.tolist() == [10, 10]


def test_a_failed_pass_leaves_nothing_in_its_cache(ids):
    model = small()
    attach(model, window=8)
    cache, expected = (transformers.DynamicCache(config=model.config) for _ in range(2))

    def call(part, into):
        return model(part, past_key_values=into, use_cache=True).logits

    def broken(*_):
        raise RuntimeError("broken")

    for part in ids[:, :20].split(10, dim=1):
        failing = model.model.norm.register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            call(part, cache)
        failing.remove()
        torch.testing.assert_close(call(part, cache), call(part, expected), rtol=0, atol=0)
    assert cache.get_seq_length() == 20
    torch.testing.assert_close(call(ids[:, 20:], cache), call(ids[:, 20:], expected), rtol=0, atol=0)
