"""Small random decoders, and what tests do with them."""

from __future__ import annotations

import functools

import torch
import transformers
from perdure.bindings.transformers import Explanation
from perdure.bindings.transformers import attach as attach_with_its_defaults
from perdure.bindings.transformers.trace import Draw

attach = functools.partial(attach_with_its_defaults, recent=0)  # documents here are shorter than what is recent
VOCABULARY, WINDOW = 61, 12
EXACT = {"rtol": 0, "atol": 1e-5}

SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}


def seeded(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # sharper attention than initial weights have, so that differences show
    return model


def llama(**changes):
    return seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})))


def gpt2(**changes):
    settings = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, **changes}
    return seeded(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)))


MODELS = {"llama": llama, "gpt2": gpt2}


@torch.no_grad()
def logits(model, ids, **extra):
    return model(input_ids=ids, **{"use_cache": False, **extra}).logits


def in_windows(model, ids, window, **extra):
    """Logits of consecutive calls, each of which is remembered by the next."""
    starts = range(0, ids.shape[1], window)
    parts = {name: [mask[:, s : s + window] for s in starts] for name, mask in extra.items()}
    calls = [logits(model, ids[:, s : s + window], **{n: p[i] for n, p in parts.items()}) for i, s in enumerate(starts)]
    return torch.cat(calls, dim=1)


def generated(model, ids, **settings):
    """15 more tokens."""
    torch.manual_seed(3)
    settings = {
        "max_new_tokens": 15,
        "min_new_tokens": 15,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
        **settings,
    }
    return model.generate(ids, **settings)[:, ids.shape[1] :]


def stored(memory):
    """All that is remembered; not what an index has learned of those who asked."""
    return {
        f"{i}.{name}.{n}": a
        for i, layer in memory.layers.items()
        for name, s in layer.stores.items()
        for n, a in s.state_dict().items()
        if ".index." not in n
    }


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) - 40 for letter in text]}

    def decode(self, ids):
        return "".join(chr(40 + i) for i in ids)


def hostile_explanation():
    """An explanation of texts that try to end the page they are shown in."""
    document, answer = "</pre><script>alert(1)</script>&amp;DOCUMENT DATA\n" * 2, 'ANSWER"><b>DOCUMENT'
    draws = {
        1: [Draw(40, 0.75, 3, 2, 5.5), Draw(3, 0.25, 0, 1, 4.5)],
        2: [],
        8: [Draw(len(document) - 2, 0.5, 1, 0, 5.0)],
    }
    return Explanation([ord(c) - 40 for c in document], [ord(c) - 40 for c in answer], draws, Letters())
