"""The page of an explanation, taken apart as a browser would: its text, its marks, and that it needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from decoders import hostile_explanation


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
    assert data == {str(t): [[d.position, d.weight, d.layer, d.head] for d in ds] for t, ds in told.draws.items()}


def test_the_page_needs_nothing_else():
    page = Page(hostile_explanation().html())
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action", "onclick"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch|XMLHttp|eval", page.script.lower())
    assert not re.search(r"https?:|@import|url\(", hostile_explanation().html().partition("<script>")[0])
