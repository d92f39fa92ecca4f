"""What cannot be remembered rightly is refused, with the reason, before anything is read or written wrongly."""

from __future__ import annotations

from array import array

import pytest
import torch
import transformers
from decoders import EXACT, LLAMA, SHAPE, Letters, attach, gpt2, llama, logits, seeded

import perdure


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))


# ---- models ---------------------------------------------------------------------------------------------------------

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CARRYING = {
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "HrmText": {"num_layers_per_stack": 2, "head_dim": 8},
    "MiniMax": {"layer_types": ["full_attention", "linear_attention", "full_attention"], "num_local_experts": 2},
    "RecurrentGemma": {"lru_width": 32},
    "Zaya": {"head_dim": 8, "num_experts": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("family", [name for name in CARRYING if hasattr(transformers, f"{name}Config")])
def test_models_that_carry_more_than_attention_are_refused(family):
    """A state of their own, that windows start anew, or several memories a layer."""
    config = getattr(transformers, f"{family}Config")
    known = {n: v for n, v in {**LLAMA, **SPECIAL, **CARRYING[family]}.items() if hasattr(config(), n)}
    model = getattr(transformers, f"{family}ForCausalLM")(config(**known))
    base = model.config._attn_implementation
    expected = "one causal self-attention in every layer"
    if family == "RecurrentGemma" and transformers.__version__.startswith("5.0."):  # refused sooner there
        expected = "a decoder with causal self-attention"
    with pytest.raises(perdure.ArgumentError, match=f"^model: expected {expected}, got "):
        attach(model)
    assert model.config._attn_implementation == base


def test_attention_that_is_more_than_a_softmax_is_refused_before_it_is_remembered(ids):
    settings = {**LLAMA, **SPECIAL, "head_dim": 8, "attn_logit_softcapping": None}
    model = seeded(lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings)))
    memory = attach(model)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 30.0
    with pytest.raises(perdure.ArgumentError, match="model: expected attention without softcap, got Gemma2Attention"):
        logits(model, ids)
    assert memory.tokens.tolist() == []


def test_layers_that_training_leaves_out_are_refused(ids):
    settings = {**SHAPE, **SPECIAL, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**settings, layerdrop=0.9)).train()
    memory = attach(model)
    torch.manual_seed(0)
    with pytest.raises(perdure.ArgumentError, match=r"model: expected a forward pass through every layer.*layerdrop"):
        model(ids, use_cache=False)
    assert memory.tokens.tolist() == []
    model.eval()
    logits(model, ids)
    assert memory.tokens.tolist() == [40, 40]


# ---- backward passes that come late ---------------------------------------------------------------------------------


def checkpointed(checkpointing=True):
    """The method has two names over the versions."""
    model = llama(num_hidden_layers=2).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model, attach(model, k=6, sinks=0)


def loss_of(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


def test_a_frozen_memory_takes_backward_passes_one_at_a_time(ids):
    gradients = []
    for checkpointing in (False, True):
        model, memory = checkpointed(checkpointing)
        memory.read_document(ids[:, :10], progress=False)
        with memory.frozen():
            for part in (ids[:, 10:20], ids[:, 20:33]):
                loss_of(model, part).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert memory.tokens.tolist() == [10, 10]
    with memory.frozen():
        both = loss_of(model, ids[:, 10:20]) + loss_of(model, ids[:, 20:33])
        with pytest.raises(perdure.ArgumentError, match=r"^backward: expected that of the newest forward pass"):
            both.backward()


@pytest.mark.parametrize("meanwhile", ["settle", "clear", "save"])
def test_memory_that_changed_before_a_backward_pass_is_noticed(meanwhile, ids, tmp_path):
    model, memory = checkpointed()
    loss = loss_of(model, ids)
    getattr(memory, meanwhile)(*([tmp_path / "memory"] if meanwhile == "save" else []))
    with pytest.raises(perdure.ArgumentError, match=r"^backward: expected that of the newest forward pass"):
        loss.backward()


def test_a_forward_pass_without_a_backward_one_disturbs_no_other(ids):
    model, memory = checkpointed()
    loss_of(model, ids[:, :10])
    loss_of(model, ids[:, 10:20]).backward()
    memory.settle()
    assert memory.tokens.tolist() == [20, 20]


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2])
def test_weights_of_attention_are_refused_once_there_are_memories(build, ids):
    model = build()
    model.set_attn_implementation("eager")
    memory = attach(model)
    assert len(model(ids, use_cache=False, output_attentions=True).attentions) == 3
    for settings in ({"use_cache": False}, {"use_cache": True}):
        with pytest.raises(perdure.ArgumentError, match=r"^output_attentions: expected False while there are memories"):
            model(ids, output_attentions=True, **settings)
    assert memory.tokens.tolist() == [40, 40]


def test_ids_that_the_model_does_not_know_are_refused(ids):
    memory = attach(llama())
    for wrong in (61, -1):
        with pytest.raises(perdure.ArgumentError, match=r"^text_or_ids: expected ids from 0 to 60, got ids from"):
            memory.read_document([[1, wrong]], progress=False)
    with pytest.raises(perdure.ShapeError, match=r"^text_or_ids"):
        memory.read_document(torch.zeros(0, 5, dtype=torch.int64), progress=False)
    assert memory.tokens.tolist() == []


def test_a_frozen_memory_scores_documents_and_refuses_to_read_them(ids):
    memory = attach(llama())
    memory.read_document(ids[:, :20], progress=False)
    with memory.frozen():
        with pytest.raises(perdure.ArgumentError, match=r"^read_document: expected memory that may be written"):
            memory.read_document(ids[:, 20:], progress=False)
        assert memory.read_document(ids[:, 20:], progress=False, score=True).shape == (2, 20)
    assert memory.tokens.tolist() == [20, 20]


def test_capacities_that_nothing_could_hold_are_refused():
    model = llama()
    with pytest.raises(perdure.ArgumentError, match=r"^capacity: expected capacity x layers x heads x bytes of"):
        attach(model, capacity=10**18)
    assert not hasattr(model, "perdure_memory")


# ---- how texts begin ------------------------------------------------------------------------------------------------


class Opening(Letters):
    """A tokenizer that begins texts with a token of its own."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, **_):
        return {"input_ids": [1] * add_special_tokens + super().__call__(text)["input_ids"]}


def test_a_text_begins_as_the_tokenizer_begins_texts(ids):
    memory = attach(llama(), tokenizer=Opening(), sinks=1)
    assert memory.read_document("ABC", progress=False) == 4
    assert memory.read_document("DEF", progress=False) == 3  # which goes on
    letters = Letters()("ABCDEF")["input_ids"]
    assert memory.history == [array("q", [1, *letters])]
    memory.clear()
    assert memory.read_document(letters, progress=False) == 6
    assert memory.history == [array("q", letters)]
    plain = attach(llama(), tokenizer=Letters())
    assert plain.read_document("ABC", progress=False) == 3
    first = attach(llama(), tokenizer=Opening())
    losses = first.read_document("ABC", progress=False, score=True)
    expected = attach(llama()).read_document([1, *letters[:3]], progress=False, score=True)
    torch.testing.assert_close(losses, expected, equal_nan=True, **EXACT)
