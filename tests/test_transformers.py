"""Memory attached to small random decoders: what it must not change, and what it must add."""

from __future__ import annotations

import copy
import functools
import inspect

import numpy as np
import pytest
import torch
import transformers
from decoders import (
    EXACT,
    LLAMA,
    MODELS,
    SHAPE,
    VOCABULARY,
    WINDOW,
    Letters,
    attach,
    generated,
    gpt2,
    in_windows,
    llama,
    logits,
    seeded,
    stored,
)
from perdure.bindings.transformers import detach
from perdure.memory.indexes import auto, ivf
from perdure.memory.indexes.costs import Costs

import perdure


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


# ---- what attaching must not change ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mixing", ["joint", "gate"])
def test_with_nothing_remembered_the_model_is_the_same_bit_for_bit(model, ids, implementation, mixing):
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    plain, padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    memory = attach(model, mixing=mixing)
    with memory.frozen():
        assert torch.equal(logits(model, ids), plain)
        assert torch.equal(logits(model, ids, attention_mask=mask), padded)
        assert torch.equal(logits(model, ids, use_cache=True), plain)
    assert torch.equal(logits(model, ids), plain)
    memory.clear()
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("mixing", ["joint", "gate"])
def test_detach_restores_the_model(model, ids, mixing):
    plain, names = logits(model, ids), list(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = set(vars(model))
    memory = attach(model, mixing=mixing)
    memory.read_document(ids, progress=False)
    assert not torch.equal(logits(model, ids), plain)
    detach(model)
    assert torch.equal(logits(model, ids), plain)
    assert list(model.state_dict()) == names
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.config._attn_implementation == "sdpa"
    assert set(vars(model)) == attributes
    attach(model)


# ---- what it must add -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sinks", [0, 3, 20])
@pytest.mark.parametrize("window", [1, 12, 40])
def test_a_memory_of_everything_is_full_attention(model, ids, window, sinks, implementation):
    model.set_attn_implementation(implementation)
    full = logits(model, ids)
    attach(model, k=ids.shape[1], sinks=sinks)
    torch.testing.assert_close(in_windows(model, ids, window), full, **EXACT)


def test_a_document_scores_as_full_attention_does(model, ids):
    full = logits(model, ids)
    expected = torch.nn.functional.cross_entropy(full[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    losses = attach(model, k=40, window=WINDOW).read_document(ids, progress=False, score=True)
    assert losses.shape == ids.shape
    assert losses[:, 0].isnan().all()
    torch.testing.assert_close(losses[:, 1:], expected, **EXACT)


def test_padding_is_neither_attended_to_nor_remembered(model, ids):
    lengths, padding = (40, 31), 9
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :padding], padded[1, padding:], mask[1, :padding] = 7, ids[1, : lengths[1]], 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for row, length in enumerate(lengths):
        memory = attach(model, k=4, capacity=14)
        alone = in_windows(model, ids[row : row + 1, :length], 40)
        question = logits(model, ids[row : row + 1, :WINDOW])
        detach(model)
        memory = attach(model, k=4, capacity=14)
        together = logits(model, padded, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(together[row, 40 - length :], alone[0], **EXACT)
        answers = logits(model, ids[:, :WINDOW].roll(0, 0)[[row, row]])
        torch.testing.assert_close(answers[row], question[0], **EXACT)
        assert memory.tokens.tolist() == [18, 18]
        detach(model)


def test_padded_segments_continue_where_the_row_ended(ids):
    model = llama()
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[:, :5] = 0
    first, second = ids[:, :20], ids[:, 20:]
    attach(model, k=64)
    logits(model, first)
    plain = logits(model, second[:, :15])
    detach(model)
    attach(model, k=64)
    logits(model, torch.cat([first[:, :5], first], 1), attention_mask=torch.cat([left[:, :5], right[:, :20]], 1))
    after = logits(model, torch.cat([first[:, :5], second[:, :15]], 1), attention_mask=left[:, :20])
    torch.testing.assert_close(after[:, 5:], plain, **EXACT)


def test_rows_do_not_see_one_another(model, ids):
    attach(model, k=8)
    logits(model, ids)
    before = logits(model, ids[:, :WINDOW])
    detach(model)
    memory = attach(model, k=8)
    other = ids.clone()
    other[1] = (other[1] + 1) % VOCABULARY
    logits(model, other)
    after = logits(model, ids[:, :WINDOW])
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1])
    memory.clear(rows=[1])
    assert memory.tokens.tolist() == [52, 0]


def test_a_cleared_row_starts_anew_and_the_others_go_on(model, ids):
    plain = logits(model, ids)
    memory = attach(model, k=8)
    logits(model, ids)
    memory.clear(rows=[0])
    after = logits(model, ids[:, :WINDOW])
    torch.testing.assert_close(after[0], plain[0, :WINDOW], **EXACT)
    assert not torch.allclose(after[1], plain[1, :WINDOW])
    memory.clear()
    assert memory.tokens.tolist() == []
    assert memory.nbytes == 0
    assert torch.equal(logits(model, ids), plain)


def test_shared_key_heads_equal_repeated_ones(ids):
    shared, repeated = llama(), llama(num_key_value_heads=4)
    repeated.load_state_dict(
        {
            name: weight.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
            if ".k_" in name or ".v_" in name
            else weight
            for name, weight in shared.state_dict().items()
        }
    )
    for model in (shared, repeated):
        attach(model, k=5)
    torch.testing.assert_close(in_windows(shared, ids, WINDOW), in_windows(repeated, ids, WINDOW), **EXACT)


def test_memory_is_bounded_and_the_first_tokens_stay(ids):
    model = llama()
    memory = attach(model, capacity=10, sinks=3, k=10, layers=1)
    memory.read_document(ids[:, :30], progress=False)
    assert memory.tokens.tolist() == [13, 13]
    with memory.tracing(keep=10) as trace, memory.frozen():
        logits(model, ids[:, 30:])
    assert trace.tokens == 10
    assert {draw.position for draw in trace.draws(4, row=1)} == set(range(20, 30))


def test_only_the_chosen_layers_remember(ids):
    model = llama()
    memory = attach(model, layers=[-1, 0])
    assert sorted(memory.layers) == [0, 2]
    memory.read_document(ids, progress=False)
    after = logits(model, ids)
    detach(model)
    attach(model, layers=[0, 1, 2])
    model.perdure_memory.read_document(ids, progress=False)
    assert not torch.allclose(logits(model, ids), after)


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**LLAMA, **SPECIAL, "head_dim": 8}
FAMILIES = {
    "Cohere2": {**WIDE, "sliding_window": 64, "sliding_window_pattern": 3},  # the last layer rotates nothing
    "Gemma": WIDE,
    "Gemma2": {**WIDE, "attn_logit_softcapping": None, "sliding_window": 64},
    "Gemma3": {**WIDE, "sliding_window": 64},
    "Glm": {**WIDE, "partial_rotary_factor": 0.5},
    "GptOss": {**WIDE, "sliding_window": 64, "num_local_experts": 2, "num_experts_per_tok": 1},
    "GPTNeoX": {**SPECIAL, **{name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}},
    "Mistral": {**LLAMA, **SPECIAL, "sliding_window": None},
    "OPT": {**SHAPE, **SPECIAL, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    "Phi": {**LLAMA, **SPECIAL},
    "Phi3": {**LLAMA, **SPECIAL},
    "Qwen2": {**LLAMA, **SPECIAL},
    "Qwen3": WIDE,
    "SmolLM3": {**LLAMA, **SPECIAL, "no_rope_layers": [1, 0, 1]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_remembers_in_full(family, ids):
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**FAMILIES[family])
    model = seeded(lambda: getattr(transformers, f"{family}ForCausalLM")(config))
    plain = logits(model, ids)
    close = {"rtol": 0, "atol": 1e-5 * float(plain.abs().max())}
    memory = attach(model, k=64, positions="true")
    assert torch.equal(logits(model, ids), plain)
    memory.clear()
    torch.testing.assert_close(in_windows(model, ids, WINDOW), plain, **close)
    detach(model)
    attach(model, k=64, positions="clamped", distance=60)
    torch.testing.assert_close(in_windows(model, ids, WINDOW), plain, **close)


# ---- positions ------------------------------------------------------------------------------------------------------

SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
ROTARIES = {
    "llama": lambda **changes: llama(**changes),
    **{
        kind: lambda kind=kind: llama(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]})
        for kind in SCALED
    },
    "partial": lambda: seeded(
        lambda: transformers.PhiForCausalLM(
            transformers.PhiConfig(**LLAMA, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        )
    ),
    "halves": lambda: seeded(
        lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**FAMILIES["GptOss"]))
    ),  # each number of its cos and sin is that of two dimensions
}


@pytest.mark.parametrize("name", ROTARIES)
@pytest.mark.parametrize("positions", ["true", "clamped"])
def test_every_kind_of_rotation_remembers_in_full(name, positions, ids):
    model = ROTARIES[name]()
    full = logits(model, ids)
    attach(model, k=64, positions=positions, distance=50)
    torch.testing.assert_close(in_windows(model, ids, 9), full, **EXACT)


@pytest.mark.parametrize("name", ROTARIES)
def test_keys_turn_as_the_model_itself_would_have_turned_them(name):
    rotary = attach(ROTARIES[name]()).layers[1].rotary
    vectors = torch.randn(2, 4, 5, 8)
    old, new = (rotary.angles(torch.tensor([p]), vectors) for p in ([3, 50, 9, 0, 99], [0, 7, 7, 31, 64]))
    width = rotary.times * old[0].shape[-1]
    assert (width < 8) == (name == "partial")
    assert (rotary.times == 2) == (name == "halves")

    def rotated(angles):
        turned = rotary.apply(vectors[..., :width], vectors[..., :width], *angles)[1]
        return torch.cat([turned, vectors[..., width:]], dim=-1)

    torch.testing.assert_close(rotary.turn(rotated(old), old, new), rotated(new))


def test_layers_that_turn_nothing_are_left_as_they_are():
    model = transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**FAMILIES["SmolLM3"]))
    assert [layer.rotary is None for layer in attach(model).layers.values()] == [False, True, False]


@pytest.mark.parametrize("name", ROTARIES)
def test_constant_distance_is_the_true_one_where_they_agree(name, ids):
    model, answers = ROTARIES[name](), []
    for settings in ({"positions": "true"}, {"positions": "constant", "distance": 1}):
        attach(model, sinks=0, **settings)
        logits(model, ids[:, :1])
        answers.append(logits(model, ids[:, 1:2]))
        detach(model)
    torch.testing.assert_close(*answers, **EXACT)


def test_constant_distance_does_not_depend_on_where_memories_stand(ids):
    model = llama(num_hidden_layers=1)
    attach(model, positions="constant", sinks=0, k=64)
    logits(model, ids[:, :20])
    question = logits(model, ids[:, 30:])
    detach(model)
    attach(model, positions="constant", sinks=0, k=64)
    positions = torch.arange(60, 80)[None]
    logits(model, ids[:, :20], position_ids=positions)
    torch.testing.assert_close(logits(model, ids[:, 30:], position_ids=positions[:, :10] + 5), question, **EXACT)


@pytest.mark.parametrize("window", [1, 7, 40])
def test_clamped_positions_are_the_true_ones_up_to_their_distance(window, ids):
    model = llama()
    full = logits(model, ids)
    memory = attach(model, k=64, positions="clamped", distance=50)
    torch.testing.assert_close(in_windows(model, ids, window), full, **EXACT)
    assert memory.layers[0].stores["far"].tokens.tolist() == [0, 0]


@pytest.mark.parametrize("window", [1, 6, 33])
@pytest.mark.parametrize("name", ROTARIES)
def test_clamped_positions_see_what_is_older_at_their_distance(name, window, ids):
    """One layer, so that keys are the same whoever computes them: its scores are known from the parts."""
    model = ROTARIES[name](num_hidden_layers=1) if name == "llama" else ROTARIES[name]()
    past, distance = 33, 5
    answers = []
    for capacity in (64, past - 4):
        memory = attach(model, k=64, positions="clamped", distance=distance, sinks=4, capacity=capacity, layers=0)
        in_windows(model, ids[:, :past], window)
        stores = memory.layers[0].stores
        assert {n: s.tokens.tolist() for n, s in stores.items()} == {"first": [4] * 2, "near": [5] * 2, "far": [24] * 2}
        assert stores["near"].search(torch.zeros(2, stores["near"].heads, 1, 8), 5).tags.unique().tolist() == [
            *range(28, 33)
        ]
        answers.append(logits(model, ids[:, past:]))
        detach(model)
    torch.testing.assert_close(*answers)
    memory = attach(model, k=64, positions="constant", distance=distance, sinks=0, layers=0)
    logits(model, ids[:, :past])
    unturned = memory.layers[0].stores["far"].at(np.tile(np.arange(4, 28), (2, 1)))
    assert not np.allclose(unturned.keys, 0)
    detach(model)
    memory = attach(model, k=64, positions="clamped", distance=distance, sinks=4, layers=0)
    in_windows(model, ids[:, :past], window)
    handed_on = memory.layers[0].stores["far"].at(np.tile(np.arange(24), (2, 1)))
    np.testing.assert_allclose(handed_on.keys, unturned.keys, atol=1e-5)
    np.testing.assert_allclose(handed_on.values, unturned.values, atol=1e-5)


def test_learned_positions_end_where_the_model_ends(ids):
    model = gpt2(n_positions=64)
    memory = attach(model, positions="true")
    memory.read_document(ids, progress=False)
    with pytest.raises(perdure.ArgumentError, match="positions: expected a document within the 64 positions"):
        logits(model, ids)
    assert memory.tokens.tolist() == [40, 40]
    detach(model)
    for positions in ("constant", "clamped"):
        memory = attach(model, positions=positions, window=WINDOW)
        for _ in range(3):
            memory.read_document(ids, progress=False)
        assert memory.tokens.tolist() == [120, 120]
        detach(model)


# ---- gradients ------------------------------------------------------------------------------------------------------


def trained(model, ids, steps=2):
    """Gradients of every parameter after reading `ids` in `steps` segments."""
    model.zero_grad()
    for part in ids.chunk(steps, dim=1):
        model(input_ids=part, labels=part, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixing", ["joint", "gate"])
def test_gradients_are_finite_and_do_not_reach_the_past(model, ids, mixing):
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    memory = attach(model, mixing=mixing, k=6)
    gradients = trained(model, ids)
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    assert all(bool(g.any()) for name, g in gradients.items() if name.endswith("perdure_gate"))
    assert sum(name.endswith("perdure_gate") for name in gradients) == (3 if mixing == "gate" else 0)
    assert memory.tokens.tolist() == [40, 40]


def test_gradients_through_memory_are_those_of_full_attention_on_a_fixed_past(ids):
    model = llama(num_hidden_layers=1)
    past, now = ids[:, :20], ids[:, 20:]
    with torch.no_grad():
        cache = model(past, use_cache=True).past_key_values
    positions = torch.arange(20, 40)[None]
    model(now, labels=now, past_key_values=cache, position_ids=positions).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    attach(model, k=64)
    logits(model, past)
    model.zero_grad()
    model(now, labels=now, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def checkpoint(model):
    """Let the model compute its activations again in the backward pass."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):  # what the method to enable it sets, under names that change
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(
                torch.utils.checkpoint.checkpoint, use_reentrant=False
            )


def test_gradient_checkpointing_changes_nothing(ids):
    model = llama()
    attach(model, k=6)
    expected = trained(model.train(), ids, steps=3)
    model.perdure_memory.clear()
    checkpoint(model)
    gradients = trained(model, ids, steps=3)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name])


# ---- reading and writing --------------------------------------------------------------------------------------------


def test_a_forward_pass_that_fails_changes_nothing(model, ids):
    memory = attach(model)
    logits(model, ids)
    before = stored(memory)

    def fail(*_):
        raise RuntimeError("out of memory")

    last = model.base_model.norm if hasattr(model.base_model, "norm") else model.base_model.ln_f
    with last.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        logits(model, ids)
    with memory.frozen():
        logits(model, ids)
    after = stored(memory)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_cache_is_read_beside_memory_and_not_written(model, ids):
    full = logits(model, ids)
    memory = attach(model, k=64)
    logits(model, ids[:, :20])
    first = model(ids[:, 20:30], use_cache=True)
    second = model(ids[:, 30:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full[:, 20:], **EXACT)
    assert memory.tokens.tolist() == [20, 20]


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 10},
    "beams": {"do_sample": False, "num_beams": 3},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize(("way", "sinks"), [("greedy", 4), *((way, 0) for way in WAYS)])
def test_generation_in_a_window_with_memory_is_generation_in_full(model, ids, way, sinks):
    ids = ids[:1] if way == "lookup" else ids
    expected = generated(model, ids, **WAYS[way])
    memory = attach(model, k=100, window=8, sinks=sinks, positions="true")
    assert torch.equal(generated(model, ids, **WAYS[way]), expected)
    assert memory.tokens.tolist() == []
    memory.read_document(ids[:, :25], progress=False)
    for _ in range(2 if way == "greedy" else 1):  # asking changes nothing, so it can be asked again
        assert torch.equal(generated(model, ids[:, 25:], **WAYS[way]), expected)
    assert memory.tokens.tolist() == [25] * len(ids)


def test_many_questions_can_be_asked_about_one_document(model, ids):
    questions = ids[:, 25:]
    alone = []
    for row in range(2):
        memory = attach(model, k=5, window=8)
        memory.read_document(ids[:1, :25], progress=False)
        alone.append(generated(model, questions[row : row + 1], do_sample=False))
        detach(model)
    memory = attach(model, k=5, window=8)
    memory.read_document(ids[:1, :25], progress=False)
    assert torch.equal(generated(model, questions, do_sample=False), torch.cat(alone))
    with memory.frozen():
        assert logits(model, questions).shape[0] == 2
    with pytest.raises(perdure.ShapeError, match="input_ids: expected 1 rows, as the memory has, got 2"):
        logits(model, questions)


def test_padded_prompts_generate_as_unpadded_ones_do(model, ids):
    short = ids[1:, 9:]
    expected = [generated(model, ids[:1], do_sample=False), generated(model, short, do_sample=False)]
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :9], mask[1, :9] = 0, 0
    attach(model, k=100, window=8, positions="true")
    assert torch.equal(generated(model, padded, do_sample=False, attention_mask=mask), torch.cat(expected))


def test_a_cache_stays_as_small_as_the_window(model, ids):
    attach(model, window=16, layers=[0, 2], k=100, sinks=0)
    cache, lengths = None, []
    for step in range(ids.shape[1]):
        cache = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True).past_key_values
        lengths.append({layer.keys.shape[2] for layer in cache.layers})
    assert cache.get_seq_length() == 40
    assert all(len(length) == 1 for length in lengths)
    assert max(length.pop() for length in lengths) == 18  # an eighth more than the window
    assert [layer.tail is None for layer in cache.layers] == [False, True, False]
    assert cache.layers[0].tail.tokens.tolist() == [40 - cache.layers[0].keys.shape[2]] * 2


@torch.no_grad()
def test_a_cropped_cache_forgets_the_newest(ids):
    model = llama()
    attach(model, window=16, k=100, sinks=0)
    cache = model(ids[:, :30], use_cache=True).past_key_values
    expected = logits(model, ids[:, 30:], past_key_values=copy.deepcopy(cache), use_cache=True)
    model(ids[:, :5], past_key_values=cache)
    cache.crop(-5)
    torch.testing.assert_close(logits(model, ids[:, 30:], past_key_values=cache, use_cache=True), expected, **EXACT)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        logits(model, ids, past_key_values=cache, use_cache=True), logits(model, ids, use_cache=True), **EXACT
    )


def test_a_static_cache_is_refused(model, ids):
    attach(model)
    with pytest.raises(perdure.ArgumentError, match="past_key_values: expected a dynamic cache"):
        generated(model, ids, cache_implementation="static")


def test_half_precision_models_remember(ids):
    model = llama()
    attach(model, k=64)
    expected = in_windows(model, ids, 20)
    detach(model)
    model.to(torch.bfloat16)
    attach(model, k=64)
    half = in_windows(model, ids, 20)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_draws_name_the_memory_that_a_token_used(ids):
    model = llama(num_hidden_layers=1)
    memory = attach(model, k=4, sinks=0)
    memory.read_document(ids[:1, :20], progress=False)
    with memory.tracing(keep=4) as trace:
        logits(model, ids[:1, 20:])
    draws = trace.draws(0)
    assert [d.weight for d in draws] == sorted((d.weight for d in draws), reverse=True)
    assert all(0 <= d.position < 20 and 0 < d.weight <= 1 and d.layer == 0 and 0 <= d.head < 4 for d in draws)
    with pytest.raises(perdure.ArgumentError, match="token: expected a number below 20"):
        trace.draws(20)
    assert memory.trace is None


def test_an_explanation_shows_the_text_that_was_drawn_on(model, tmp_path):
    document, question = "ABCDEFGHIJKLMNOPQRSTUV<WX", "ABC</ABC"
    memory = attach(model, tokenizer=Letters(), k=3, sinks=2, window=8)
    with pytest.raises(perdure.ArgumentError, match="explain: expected a tokenizer and a trace, got no trace"):
        memory.explain()
    memory.read_document(document, progress=False)
    with memory.tracing(keep=3), torch.no_grad():
        model.generate(torch.tensor(Letters()(question)["input_ids"])[None], max_new_tokens=12, pad_token_id=1)
    told = memory.explain(3, most=4)
    (draws,) = told.draws.values()
    assert 0 < len(draws) <= 4
    read = document + Letters().decode(memory.last_trace.ids())
    assert read.startswith(document + question)
    for draw in draws:
        assert f"«{read[draw.position]}»" in told.passage(draw)
        assert 2 <= draw.position < len(document)
    assert str(told).startswith("token 3, '<', drew on\n ")
    everything = memory.explain()
    last = everything.draws[max(everything.draws)]
    assert max(d.position for d in last) < len(read) - 8  # what the cache let go of counts on from the document
    assert any(d.position > len(document) for draws in everything.draws.values() for d in draws)
    page = everything.save_html(tmp_path / "page.html").read_text("utf-8")
    assert page.count("<script>") == page.count("</script>") == 1
    assert "&lt;" in page
    assert all(f'id="m{draw.position}"' in page for draw in draws)
    with pytest.raises(perdure.FileError, match="path: expected a file to write"):
        everything.save_html(tmp_path)


# ---- bad input ------------------------------------------------------------------------------------------------------

WRONG = {
    "layers": ([3], ["all", 0], [], "some", [0.5]),
    "k": (0, -1, 2.5, 65_537),
    "capacity": (0, None),
    "mixing": ("sum",),
    "positions": ("rope",),
    "window": (0,),
    "sinks": (-1,),
    "index": ("fast",),
    "target_recall": (0, 1.5),
}


@pytest.mark.parametrize(("argument", "value"), [(a, v) for a, values in WRONG.items() for v in values])
def test_wrong_arguments_are_named_and_leave_the_model_alone(argument, value):
    model = llama()
    with pytest.raises(perdure.ArgumentError, match=f"^{argument}: expected "):
        attach(model, **{argument: value})
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model, "perdure_memory")


def test_as_many_memories_may_be_asked_for_as_all_stores_hold(ids):
    """None of the stores behind one layer holds so many, and no store is asked for more than it may hold."""
    model = llama()
    full = logits(model, ids)
    attach(model, k=70_000, capacity=70_000, distance=60)
    torch.testing.assert_close(in_windows(model, ids, WINDOW), full, **EXACT)


def test_how_memories_are_found_is_chosen_by_their_number(ids, monkeypatch):
    """By default few are searched exactly, and many in lists, which audits let find nearly all."""
    monkeypatch.setattr(ivf, "FIRST", 256)
    monkeypatch.setattr(auto, "LEAST", 256)
    monkeypatch.setattr(auto, "EVERY", 1)
    monkeypatch.setattr(auto, "machine_costs", lambda: Costs(lists=1e-6, trained=1e-6))
    found, losses = {}, {}
    long = ids.reshape(1, -1).repeat(1, 8)
    for index in ("auto", "exact"):
        memory = attach(llama(), k=40, window=40, distance=300, capacity=900, index=index)
        losses[index] = memory.read_document(long, progress=False, score=True)
        found[index] = {n: store.explain() for n, store in memory.layers[0].stores.items() if n in ("near", "far")}
    assert memory.settings["index"] == "exact"
    assert all("auto: " in told for told in found["auto"].values())
    assert any("inverted lists" in told and "target 0.8" in told for told in found["auto"].values())
    assert torch.equal(losses["auto"][:, 1:280], losses["exact"][:, 1:280])
    assert not torch.equal(losses["auto"][:, 280:], losses["exact"][:, 280:])
    assert inspect.signature(attach).parameters["index"].default == "auto"


LATENT = {
    **{"intermediate_size": 16, "moe_intermediate_size": 8, "n_routed_experts": 2, "num_experts_per_tok": 1},
    **{"n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
}


def test_models_that_memory_cannot_join_are_refused():
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    with pytest.raises(perdure.ArgumentError, match="a decoder with causal self-attention"):
        attach(encoder)
    fixed = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    )
    with pytest.raises(perdure.ArgumentError, match="attention that can be replaced"):
        attach(fixed)
    turned_in_part = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**SHAPE, **SPECIAL, "num_hidden_layers": 1}, **LATENT)
    )
    with pytest.raises(perdure.ArgumentError, match="keys whose rotation can be undone"):
        attach(turned_in_part)
    assert turned_in_part.config._attn_implementation == "sdpa"
    with pytest.raises(perdure.ArgumentError, match="a PreTrainedModel"):
        attach(torch.nn.Linear(2, 2))
    other = llama(attn_implementation="flex_attention")
    with pytest.raises(
        perdure.ArgumentError, match=r"attention implementation sdpa or eager, got 'flex.*set_attn_impl"
    ):
        attach(other)
    model = llama()
    with pytest.raises(perdure.ArgumentError, match="detach"):
        attach(model) and attach(model)
    detach(model)
    with pytest.raises(perdure.ArgumentError, match="attach"):
        detach(model)


def test_wrong_segments_are_refused_and_change_nothing(ids):
    model = llama()
    memory = attach(model, window=WINDOW)
    for document in ("text", [[1.5]], [], [[[1]]], None):
        with pytest.raises(perdure.ArgumentError, match="text_or_ids"):
            memory.read_document(document, progress=False)
    memory.read_document(ids, progress=False)
    with pytest.raises(perdure.ShapeError, match="input_ids: expected 2 rows"):
        logits(model, ids[:1])
    with pytest.raises(perdure.ShapeError, match="attention_mask"):
        logits(model, ids, attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool))
    assert memory.tokens.tolist() == [40, 40]
    assert memory.read_document(ids, progress=False) == 40


# ---- what is recent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["true", "clamped", "constant"])
@pytest.mark.parametrize("recent", [3, 13, 50])
def test_what_is_recent_is_read_whole(model, ids, recent, positions):
    full = logits(model, ids)
    memory = attach(model, k=64, recent=recent, window=9, positions=positions, distance=60, sinks=0)
    given = in_windows(model, ids, 9)
    if positions != "constant" or (recent == 50 and model.config.model_type == "llama"):
        torch.testing.assert_close(given, full, **EXACT)
    assert memory.tokens.tolist() == [40, 40]
    stores = memory.layers[0].stores
    assert stores["recent"].tokens.tolist() == [min(recent, 40)] * 2
    assert memory.layers[0].written.tolist() == [40, 40]


def test_recent_memory_of_the_window_before_is_transformer_xl_with_first_tokens(ids):
    model = llama(num_hidden_layers=1)
    attach(model, capacity=8, recent=8, sinks=2)
    given = in_windows(model, ids, 8)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()
    query, key = torch.arange(40)[:, None], torch.arange(40)[None]
    allowed &= (key // 8 >= query // 8 - 1) | (key < 2)
    detach(model)
    shifted = (query // 8 == 1) & (key < 2)  # of the first window two tokens went to `first`, and eight are kept of 16
    allowed |= shifted
    mask = allowed[None, None]
    torch.testing.assert_close(given[:, 8:16], logits(model, ids, attention_mask=mask)[:, 8:16], **EXACT)
    torch.testing.assert_close(given[:, 24:], logits(model, ids, attention_mask=mask)[:, 24:], **EXACT)


def test_reading_without_retrieval_sees_what_is_recent_and_remembers_all(ids):
    model = llama()
    attach(model, capacity=12, recent=12, k=1, sinks=0, window=WINDOW)
    expected = model.perdure_memory.read_document(ids, progress=False, score=True)
    detach(model)
    memory = attach(model, recent=12, sinks=0, window=WINDOW, distance=20)
    losses = memory.read_document(ids, progress=False, score=True, retrieve=False)
    torch.testing.assert_close(losses, expected, equal_nan=True, **EXACT)
    assert memory.tokens.tolist() == [40, 40]
    detach(model)
    shallow, answers = llama(num_hidden_layers=1), []  # whose keys do not depend on what was retrieved
    for retrieve in (False, True):
        memory = attach(shallow, k=4, recent=6, window=WINDOW, distance=20)
        memory.read_document(ids[:, :30], progress=False, retrieve=retrieve)
        answers.append(logits(shallow, ids[:, 30:]))
        detach(shallow)
    assert torch.equal(*answers)


def test_layers_without_memory_read_what_is_recent(ids):
    model = llama()
    memory = attach(model, layers=[1], recent=6, sinks=2, k=64)
    in_windows(model, ids, 10)
    assert {i: layer.tokens.tolist() for i, layer in memory.layers.items()} == {0: [8, 8], 1: [40, 40], 2: [8, 8]}
    assert memory.tokens.tolist() == [40, 40]
    assert generated(model, ids[:, :5]).shape == (2, 15)


def test_recent_tokens_are_explained_too(ids):
    model = llama(num_hidden_layers=1)
    memory = attach(model, tokenizer=Letters(), recent=12, sinks=0, k=2)
    memory.read_document(ids[:1, :30], progress=False)
    with memory.tracing(keep=30) as trace, memory.frozen():
        logits(model, ids[:1, 30:])
    positions = {draw.position for draw in trace.draws(3)}
    assert set(range(18, 30)) <= positions
    assert min(positions) < 18
    assert len(positions) <= 12 + 2 * 4


# ---- sliding windows -------------------------------------------------------------------------------------------------

SLIDING = {
    "Gemma2": {"attn_logit_softcapping": None},
    "Gemma3": {},
    "Mistral": {},
    "Phi3": {},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}


def sliding(family, window):
    """A decoder of that family in which some layers, or all, attend to `window` tokens."""
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    settings = {**WIDE, **SLIDING[family], "sliding_window": window, "eos_token_id": None}
    if family in ("Mistral", "Phi3"):
        del settings["head_dim"]
    return seeded(lambda: getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, name)(**settings)))


@pytest.mark.parametrize("family", SLIDING)
def test_memory_reaches_where_a_sliding_window_ends(family, ids):
    narrow, wide = sliding(family, 8), sliding(family, 64)
    plain, full = logits(narrow, ids), logits(wide, ids)
    close = {"rtol": 0, "atol": 1e-5 * float(full.abs().max())}
    assert not torch.allclose(plain, full, **close)
    memory = attach(narrow, k=64, positions="true", window=16)
    assert torch.equal(logits(narrow, ids), plain)
    memory.clear()
    torch.testing.assert_close(in_windows(narrow, ids, 4), full, **close)
    memory.clear()
    cache, steps = None, []
    with torch.no_grad():
        for step in range(40):
            out = narrow(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, **close)
    assert {layer.keys.shape[2] for layer in cache.layers} <= {7, 16, 17, 18}
    memory.read_document(ids[:, :20], progress=False)
    for way in ("greedy", "beams"):
        assert generated(narrow, ids[:, 20:26], **WAYS[way]).shape == (2, 15)


# ---- generation ------------------------------------------------------------------------------------------------------


def test_an_assistant_drafts_what_memory_would_have_written(ids):
    model, assistant, given = llama(), llama(num_hidden_layers=1), []
    for drafting in (None, assistant):
        attach(model, k=100, window=8, positions="true")
        model.perdure_memory.read_document(ids[:1, :25], progress=False)
        given.append(generated(model, ids[:1, 25:], do_sample=False, min_new_tokens=None, assistant_model=drafting))
        detach(model)
    assert torch.equal(*given)


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_questions_share_a_document_and_leave_it_as_it_was(model, ids, way):
    memory = attach(model, k=5, window=8, sinks=2)
    memory.read_document(ids[:1, :25], progress=False)
    arrays = {n: a for layer in memory.layers.values() for n, a in layer.stores["near"]._rows[0].arrays.items()}
    before, nbytes = stored(memory), memory.nbytes
    generated(model, ids[:, 25:], **WAYS[way])
    after = stored(memory)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert memory.nbytes == nbytes
    shared = {n: a for layer in memory.layers.values() for n, a in layer.stores["near"]._rows[0].arrays.items()}
    assert all(shared[name] is arrays[name] for name in arrays)  # no copy was made for any row or beam


# ---- caches, copies and passes that memory cannot follow ------------------------------------------------------------


def test_a_copied_cache_goes_on_where_it_was(ids):
    """Prefilled once, and copied for each question."""
    model = llama()
    full = logits(model, ids)
    memory = attach(model, k=64, positions="true", sinks=0)
    memory.read_document(ids[:, :20], progress=False)
    with torch.no_grad():
        cache = model(ids[:, 20:30], use_cache=True).past_key_values
    for copied in (copy.deepcopy(cache), copy.deepcopy(cache), cache):
        torch.testing.assert_close(
            logits(model, ids[:, 30:], past_key_values=copied, use_cache=True), full[:, 30:], **EXACT
        )


@pytest.mark.parametrize("meanwhile", ["clear", "read_document", "begun before"])
def test_a_cache_of_other_memories_is_refused(meanwhile, ids):
    model = llama()
    with torch.no_grad():
        before = model(ids[:, :10], use_cache=True).past_key_values
        memory = attach(model)
        memory.read_document(ids[:, :20], progress=False)
        cache = before if meanwhile == "begun before" else model(ids[:, 20:30], use_cache=True).past_key_values
    if meanwhile != "begun before":
        getattr(memory, meanwhile)(*([ids[:, :5]] if meanwhile == "read_document" else []))
    with pytest.raises(perdure.ArgumentError, match="past_key_values: expected a cache that began with what is rem"):
        logits(model, ids[:, 30:], past_key_values=cache, use_cache=True)


def test_what_has_left_a_cache_cannot_be_taken_back(ids):
    model = llama()
    attach(model, window=8)
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_key_values
    with pytest.raises(perdure.ArgumentError, match="tokens_to_remove: expected at most the 8 tokens"):
        cache.crop(10)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize(("read", "nearest"), [(20, 25), (4, 11)])
def test_clamped_distances_stop_growing_while_a_cache_grows(ids, read, nearest):
    """Far beyond a document, a query sees it as from one window beyond its end, or beyond `distance` of its first."""
    document, written = ids[:, :read], ids[:, :4].repeat(1, 12)
    model = llama()
    memory = attach(model, k=64, recent=3, sinks=2, distance=6, window=5)
    memory.read_document(document, progress=False)
    with torch.no_grad():
        cache = model(written[:, :8], use_cache=True).past_key_values
        seen = []
        turn = type(memory.layers[0].rotary).turn

        def noted(rotary, vectors, old, new):
            seen.append(new)
            return turn(rotary, vectors, old, new)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(memory.layers[0].rotary), "turn", noted)
            logits(model, written[:, 8:9], past_key_values=cache, use_cache=True)
        assert memory.nearest.tolist() == [[nearest], [nearest]]
        near = memory.layers[0].rotary.angles(memory.nearest, torch.zeros(1))[0]
        assert any(cos.shape == near.shape and torch.allclose(cos, near) for cos, _ in seen)
        far = logits(model, written[:, 9:], past_key_values=cache, use_cache=True)
    assert far.isfinite().all()


def test_left_padding_does_not_move_the_first_tokens(ids):
    """They are seen from `distance`, wherever padding made them stand."""
    pads, document, question = 7, ids[1:, :13], ids[1:, 20:]
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.int64), document], dim=1)
    answers = []
    for read in (padded, document):
        model = llama()
        attach(model, k=64, recent=3, sinks=2, distance=9)
        logits(model, read, attention_mask=(torch.arange(read.shape[1]) >= read.shape[1] - 13)[None].long())
        answers.append(logits(model, question))
    torch.testing.assert_close(*answers, **EXACT)


def test_a_copy_of_an_attached_model_is_refused():
    """Its hooks would still feed the memory of the original."""
    model = llama()
    attach(model)
    with pytest.raises(perdure.ArgumentError, match="Call detach"):
        copy.deepcopy(model)
    detach(model)
    copy.deepcopy(model)


def test_segments_longer_than_a_table_of_positions_are_refused():
    model = gpt2()
    memory = attach(model)
    with pytest.raises(perdure.ArgumentError, match="input_ids: expected at most 96 tokens"):
        memory.read_document(torch.zeros(1, 97, dtype=torch.int64), progress=False)
    assert not memory.tokens.sum()


def test_a_question_may_be_asked_by_several_rows_at_once(ids):
    """A plain call of more rows than are remembered, each of which continues one of them."""
    model = llama()
    memory = attach(model)
    memory.read_document(ids[:, :20], progress=False)
    with memory.frozen():
        every = logits(model, ids[:, 30:].repeat_interleave(2, 0))
        one = logits(model, ids[:, 30:])
    torch.testing.assert_close(every, one.repeat_interleave(2, 0), **EXACT)


def test_a_model_without_a_head_reads_and_cannot_score(ids):
    model = llama().model
    memory = attach(model)
    assert memory.read_document(ids, progress=False) == 40
    with pytest.raises(perdure.ArgumentError, match="score: expected a model that predicts tokens"):
        memory.read_document(ids, progress=False, score=True)
    assert memory.tokens.tolist() == [40, 40]


def test_weights_of_gated_memories_are_shares_of_the_whole_head(ids):
    model = llama()
    memory = attach(model, mixing="gate")
    memory.read_document(ids[:, :30], progress=False)
    drawn = []
    for bias in (0.0, -30.0):
        for layer in model.model.layers:
            torch.nn.init.constant_(layer.self_attn.perdure_gate, bias)
        with memory.frozen(), memory.tracing() as trace:
            logits(model, ids[:, 30:])
        drawn.append(max(draw.weight for draw in trace.draws(9)))
    assert 0 < drawn[0] <= 0.5
    assert 0 <= drawn[1] < 1e-12


def test_explanations_keep_the_text_of_their_trace(ids):
    """What was cleared since, or padding beside it, does not change whose text is told."""
    model = llama()
    memory = attach(model, tokenizer=Letters(), window=6, sinks=0)
    memory.read_document(ids[:1, :12], progress=False)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids[:1, 12:20]], dim=1)
    with memory.tracing():
        generated(model, padded, attention_mask=(torch.arange(13) >= 5)[None].long())
    told = memory.explain()
    assert told.document[:20] == ids[0, :20].tolist()
    assert all(draw.position < len(told.document) for draws in told.draws.values() for draw in draws)
    after = memory.last_trace.tokens
    assert "what comes next drew on" in str(memory.explain(after))
    scores = [draw.score for draw in memory.last_trace.draws(after - 1)]
    assert len(set(scores)) > 1
    memory.clear()
    memory.read_document(ids[1:, :30], progress=False)
    assert memory.explain().document == told.document
    with pytest.raises(perdure.ArgumentError, match="row: expected a number below 1"):
        memory.explain(row=5)


def unlike(name):
    common = {**LLAMA, "pad_token_id": 0}
    if name == "two calls a layer":
        return transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**common))
    if name == "a state beside attention":
        kinds = ["conv", "full_attention", "conv"]
        return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**common, layer_types=kinds))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, is_causal=False))


@pytest.mark.parametrize("name", ["two calls a layer", "a state beside attention", "attention both ways"])
def test_models_that_would_be_remembered_wrongly_are_refused(name):
    model = unlike(name)
    with pytest.raises(perdure.ArgumentError, match=r"^model: expected "):
        attach(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_is_left_out_cannot_remember(ids):
    model = llama()
    memory = attach(model)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(perdure.ArgumentError, match=r"model: expected a forward pass through every layer.*\[0, 2\]"):
        logits(model, ids)
    assert not memory.tokens.sum()


@pytest.mark.parametrize(
    ("argument", "value"), [("device", "nope"), ("layers", None), ("layers", True), ("layers", 1e9)]
)
def test_wrong_kinds_of_arguments_are_named(argument, value):
    with pytest.raises(perdure.ArgumentError, match=f"^{argument}: expected "):
        attach(llama(), **{argument: value})


def test_numbers_of_numpy_are_numbers(ids, tmp_path):
    memory = attach(llama(), capacity=np.int64(100), window=np.int32(10))
    memory.read_document(ids, progress=False)
    memory.save(tmp_path / "memory")


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


def checkpointed():
    model = llama().train()
    checkpoint(model)
    return model


def test_rows_that_stay_remember_a_last_segment_whose_backward_pass_is_over(ids):
    model = checkpointed()
    memory = attach(model)
    for start in range(0, 40, 10):
        part = ids[:, start : start + 10]
        model(part, labels=part).loss.backward()
    memory.clear(rows=[0])
    assert memory.tokens.tolist() == [0, 40]


def test_backward_passes_of_earlier_segments_are_refused(ids):
    model = checkpointed()
    attach(model)
    losses = [model(part, labels=part).loss for part in ids.split(20, dim=1)]
    with pytest.raises(perdure.ArgumentError, match="backward: expected that of the newest forward pass"):
        sum(losses).backward()


def test_memories_beyond_those_a_model_was_trained_with_weigh_less(ids):
    """Six and twelve times as many at one distance as the rest of the context has room for."""
    document = torch.cat([ids[:, :2], ids[:, 2:12].repeat(1, 24)], dim=1)
    seen = {}
    for context in (40, 60, 400):
        model = llama(max_position_embeddings=context)
        memory = attach(model, k=300, sinks=2, positions="constant", distance=20, capacity=400, index="exact")
        memory.read_document(document, progress=False, retrieve=False)
        layer, query = memory.layers[0], torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(2))
        at = torch.tensor([[300]])
        angles = layer.rotary.angles(at, query)
        with memory.tracing():
            seen[context] = layer.read(query, query, angles, at, 0.3)["far"]
    assert int(layer.stores["far"].tokens[0]) == 240
    torch.testing.assert_close(seen[60].lse, seen[400].lse - np.log(240 / 40) / 2)
    torch.testing.assert_close(seen[60].output, seen[400].output)
    torch.testing.assert_close(seen[40].lse, seen[400].lse - 1)  # at most
    torch.testing.assert_close(seen[60].neighbours.scores * 0.3, seen[400].neighbours.scores * 0.3 - np.log(6) / 2)
