"""Explanations tell the text that was drawn on; their page, taken apart as a browser would, needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import tokenizers
import torch
import transformers
from decoders import Letters, attach, generated, hostile_explanation, llama, logits
from perdure.bindings.demo.report import passage as demo_passage
from perdure.bindings.transformers import Explanation
from perdure.bindings.transformers.trace import Draw

import perdure


class Page(HTMLParser):
    """What a page holds: the text of both columns, the marked spans, the buttons, and every attribute."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.marks, self.buttons, self.attributes, self.script = [], [], {}, {}, [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.attributes += attributes
        self.open.append((tag, found))
        if tag == "pre":
            self.texts.append("")
        if tag == "span":
            assert found["id"] not in self.marks
            self.marks[found["id"]] = ""
        if tag == "button":
            self.buttons[found["data-token"]] = ""

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if tags[-1:] == ["pre"] and not self.texts[-1]:
            data = data.removeprefix("\n")  # which a browser takes for the way the page is written
        if "pre" in tags:
            self.texts[-1] += data
        for tag, found in self.open:
            if tag == "span":
                self.marks[found["id"]] += data
            if tag == "button":
                self.buttons[found["data-token"]] += data
            if tag == "script":
                self.script += data


def test_the_page_shows_both_texts_with_what_was_drawn_on_marked():
    told = hostile_explanation()
    page = Page(told.html())
    document, answer = (told.tokenizer.decode(ids) for ids in (told.document, told.answer))
    assert page.texts == [answer, document]
    drawn = {draw.position for draws in told.draws.values() for draw in draws}
    assert page.marks == {f"m{position}": document[position] for position in drawn}
    assert page.buttons == {str(token): answer[token] for token, draws in told.draws.items() if draws}
    data = json.loads(re.search(r"const draws = (\{.*?\}), list", page.script)[1])
    assert data == {
        str(t): [[d.position, d.weight, d.layer, d.head, d.score] for d in ds] for t, ds in told.draws.items()
    }


def test_the_page_needs_nothing_else():
    page = Page(hostile_explanation().html())
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action", "onclick"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch|XMLHttp|eval", page.script.lower())
    assert not re.search(r"https?:|@import|url\(", hostile_explanation().html().partition("<script>")[0])


# ---- characters of several tokens -----------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_characters_of_several_tokens_are_shown_whole():
    text = "naïve café 記憶 ∑x"
    ids = list(text.encode())
    draws = {t: [Draw(p, 0.5, 0, 0, 1.0) for p in range(len(ids))] for t in range(len(ids))}
    told = Explanation(ids, ids, draws, Bytes())
    page = Page(told.html())
    assert page.texts[1] == text
    assert page.texts[0].replace("◦", "") == text
    assert page.marks["m3"] == "ï"
    at = len("naïve café ".encode())
    assert [page.marks[f"m{at + i}"] for i in range(6)] == ["記"] * 3 + ["憶"] * 3
    assert "�" not in told.html() + str(told)
    assert f"token {at + 1}: …aïve café «記»憶 ∑x…" in told.passage(draws[0][at + 1])


def test_bytes_that_are_no_character_and_ids_that_are_not_known_are_shown_as_such():
    told = Explanation([120, 255, 255, 255, 255, 255, 121, -1, -1], [120], {1: [Draw(3, 1.0, 0, 0, 1.0)]}, Bytes())
    assert "«�»" in told.passage(told.draws[1][0])
    page = Page(told.html())
    assert page.texts[1] == "x" + "�" * 5 + "y▯▯"
    assert page.buttons == {"1": "what comes next"}


def words(decoder):
    """A tokenizer of words, and the ids of a text that has one token a word."""
    text = "the cat sat on the mat and the key is blue"
    known = ["<unk>", *dict.fromkeys("▁" + word for word in text.split())]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), decoder
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    return text, tokenizer(text)["input_ids"], tokenizer


def llama_2():
    parts = tokenizers.decoders
    return parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)])


@pytest.mark.parametrize("decoder", [llama_2, tokenizers.decoders.Metaspace])
def test_words_keep_their_spaces(decoder):
    text, ids, tokenizer = words(decoder())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[3:4]) == "on"
    told = Explanation(ids, ids, {t: [Draw(t - 1, 0.5, 0, 0, 1.0)] for t in range(1, len(ids))}, tokenizer)
    page = Page(told.html())
    assert page.texts == [text, text]
    assert page.marks["m3"] == " on"
    assert told.passage(told.draws[4][0]) == "token 3: …the cat sat« on» the mat and the key is blue…"
    assert demo_passage(torch.tensor(ids), 3, tokenizer, after=2) == "…the cat sat« on» the mat…"


def test_the_first_line_of_a_text_may_be_empty():
    ids = list(b"\n\nx")
    assert Page(Explanation(ids, ids, {}, Bytes()).html()).texts == ["\n\nx"] * 2


# ---- whose text is told ---------------------------------------------------------------------------------------------


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))


def remembering(**settings):
    return attach(llama(num_hidden_layers=1), **{"tokenizer": Letters(), "k": 4, "window": 8, "sinks": 0, **settings})


def test_rejected_drafts_are_no_part_of_the_answer():
    memory = remembering()
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with memory.tracing(keep=4) as trace:
        answer = generated(memory.model, prompt, do_sample=False, prompt_lookup_num_tokens=4)
    written = [*prompt[0].tolist(), *answer[0].tolist()]
    assert trace.ids() == written[:-1]
    assert sum(segment.ids.shape[1] for segment in trace._segments) > len(written) - 1  # some were rejected
    told = memory.explain()
    assert told.document == written[:-1]
    assert list(told.draws) == list(range(1, len(written)))
    for token, draws in told.draws.items():
        assert all(draw.position < token for draw in draws)
    assert told.draws[len(written) - 1]


def test_beams_are_not_explained(ids):
    memory = remembering()
    memory.read_document(ids[:1, :20], progress=False)
    with memory.tracing():
        generated(memory.model, ids[:1, 20:30], num_beams=3, do_sample=False)
    with pytest.raises(perdure.ArgumentError, match="explain: expected rows that are each one text, got beams"):
        memory.explain()
    with memory.tracing():
        generated(memory.model, ids[:1, 20:30].expand(3, -1), do_sample=True)
    assert memory.explain(row=2).draws


def test_memories_of_a_cache_are_told_by_the_tokens_that_went_through_it(ids):
    """Several questions in one trace, one of them padded, after a document that grows later."""
    memory = remembering()
    memory.read_document(ids[:, :12], progress=False)
    questions, mask = ids[:, 12:30].clone(), torch.ones(2, 18, dtype=torch.int64)
    mask[1, :5] = questions[1, :5] = 0
    written, first = [], 0
    with memory.tracing(keep=4) as trace:
        for part, there in ((questions, mask), (ids[:, 30:], torch.ones_like(ids[:, 30:]))):
            answer = generated(memory.model, part, attention_mask=there, do_sample=False)
            kept = torch.cat([there.bool(), torch.ones(2, 14, dtype=torch.bool)], dim=1)
            fed = torch.cat([part, answer[:, :-1]], dim=1)
            written.append([fed[row][kept[row]].tolist() for row in range(2)])
    memory.read_document(ids[:, :9], progress=False)
    for row in range(2):
        told, tails = memory.explain(row=row, most=100), 0
        assert told.document == [*ids[row, :12].tolist(), *written[0][row], *written[1][row]]
        for token, draws in told.draws.items():
            second = token - 1 >= 18 + 14
            first = 12 + second * len(written[0][row])
            for ours, raw in zip(draws, trace.draws(token - 1, row), strict=True):
                expected = raw.position if raw.position < 12 else first + raw.position - 12
                assert ours.position == expected < len(told.document)
                tails += raw.position >= 12
        assert tails


def test_tokens_cached_before_a_trace_are_told_as_unknown(ids):
    memory = remembering()
    with torch.no_grad():
        cache = memory.model(ids[:1, :20], use_cache=True).past_key_values
        with memory.tracing():
            memory.model(ids[:1, 20:], past_key_values=cache)
    told = memory.explain(20)
    assert told.document == [-1] * 20 + ids[0, 20:].tolist()
    assert any(draw.position < 20 for draw in told.draws[20])
    assert "«▯»" in str(told)


@pytest.mark.parametrize("caching", [False, True])
def test_a_call_that_failed_is_no_part_of_the_answer(caching, ids):
    memory = remembering()
    memory.read_document(ids[:1, :20], progress=False)
    with memory.frozen(), memory.tracing() as trace:
        logits(memory.model, ids[:1, 20:22])
        failing = memory.model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(memory.model, ids[:1, :3], use_cache=caching)
        failing.remove()
        with pytest.raises(perdure.ShapeError):
            logits(memory.model, ids[:1, :3], attention_mask=torch.ones(1, 1, 3, 3))
        logits(memory.model, ids[:1, 22:26])
    assert trace.ids() == ids[0, 20:26].tolist()
    assert memory.explain().answer == ids[0, 20:26].tolist()


def test_a_memory_that_was_cleared_is_told_as_it_was(ids):
    memory = remembering()
    memory.read_document(ids[:1, :30], progress=False)
    with memory.frozen(), memory.tracing():
        logits(memory.model, ids[:1, 30:])
    before = str(memory.explain())
    memory.clear()
    memory.read_document(ids[1:, :30], progress=False)
    assert str(memory.explain()) == before


def test_embedded_tokens_are_told_as_unknown(ids):
    memory = remembering()
    with torch.no_grad():
        memory.model(inputs_embeds=memory.model.get_input_embeddings()(ids[:1, :20]), use_cache=False)
    with memory.frozen(), memory.tracing():
        logits(memory.model, ids[:1, 20:])
    assert "«▯»" in str(memory.explain(3))


def test_tokens_and_rows_that_were_not_traced_are_refused(ids):
    memory = remembering()
    memory.read_document(ids[:1, :30], progress=False)
    with memory.frozen(), memory.tracing() as trace:
        logits(memory.model, ids[:1, 30:])
    for call in (lambda: memory.explain(row=1), lambda: trace.draws(0, row=1)):
        with pytest.raises(perdure.ArgumentError, match=r"^row: expected a number below 1"):
            call()
    with pytest.raises(perdure.ArgumentError, match=r"^token: expected a whole number of at most 10"):
        memory.explain(11)
    assert str(memory.explain(10)).startswith("what comes next drew on")
