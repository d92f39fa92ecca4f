"""What answers drew on, for a person to read: printed, or as an HTML page that highlights memories in their text."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...backends.errors import FileError
from .trace import Draw

AROUND = 12  # tokens shown on each side of a memory
CUT = "\ufffd"  # what decoding makes of a character of which tokens are missing
LONGEST = 4  # tokens that a character may take
CONTINUED, UNKNOWN = "◦", "▯"  # shown for a token that ends what another began, and for one that is not known


def added(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The text of `ids[start:end]` where they stand: decoders of words drop the space that a text begins with.

    So they are decoded together with those before them, as far back as these begin with a whole character.
    """
    for before in range(1, LONGEST + 1):
        earlier = list(ids[max(start - before, 0) : start])
        told = "" if -1 in earlier else tokenizer.decode(earlier) if earlier else ""
        if told and CUT not in told:
            text = tokenizer.decode([*earlier, *ids[start:end]])
            if text.startswith(told):
                return text[len(told) :]
    return tokenizer.decode(list(ids[start:end]))


@dataclass(frozen=True)
class Explanation:
    """Some tokens, and the memories that predicting each of them drew on.

    Attributes
    ----------
    document : sequence of int
        Ids of all that could be drawn on, what was read first; positions of draws count in it, and -1 is not known.
    answer : sequence of int
        Ids of the tokens that were traced.
    draws : dict of int to list of Draw
        For some of these tokens, by their number, the memories that its prediction drew on, strongest first; their
        number is that of the one that comes next.
    tokenizer : object
        With `decode(ids)`.
    """

    document: Sequence[int]
    answer: Sequence[int]
    draws: dict[int, list[Draw]]
    tokenizer: Any

    def __str__(self) -> str:
        lines = []
        for token, draws in self.draws.items():
            told = self._text(self.answer, *self._whole(self.answer, token))
            lines.append(f"token {token}, {told!r}, drew on" if token < len(self.answer) else "what comes next drew on")
            lines += [
                f"  {d.weight:4.0%}  layer {d.layer}, head {d.head}, score {d.score:.1f}  {self.passage(d)}"
                for d in draws
            ]
            lines += [] if draws else ["  nothing remembered"]
        return "\n".join(lines)

    def passage(self, draw: Draw) -> str:
        """The text around the memory of a `draw`, which stands between guillemets, on one line."""
        start, end = self._whole(self.document, draw.position)
        spans = (max(start - AROUND, 0), start), (start, end), (end, min(end + AROUND, len(self.document)))
        before, here, after = (self._text(self.document, *span).replace("\n", "⏎") for span in spans)
        return f"token {draw.position}: …{before.lstrip(CUT)}«{here}»{after.rstrip(CUT)}…"

    def save_html(self, path: str | Path) -> Path:
        """Write a page to `path` that needs nothing but a browser: choose a token, and see what it drew on.

        Raises
        ------
        FileError
            The file cannot be written.
        """
        path = Path(path)
        try:
            path.write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise FileError("path", "a file to write", f"{path} ({error.strerror})", "Name another file.") from error
        return path

    def html(self) -> str:
        """The page of `save_html`."""
        drawn = sorted(
            {draw.position for draws in self.draws.values() for draw in draws if draw.position < len(self.document)}
        )
        together: list[tuple[int, int, list[int]]] = []  # memories of tokens that share a character
        for position in drawn:
            start, end = self._whole(self.document, position)
            inside = [position]
            if together and start < together[-1][1]:
                before, earlier, others = together.pop()
                start, end, inside = before, max(end, earlier), [*others, position]
            together.append((start, end, inside))
        document, done = [], 0
        for start, end, inside in together:
            marks = "".join(f'<span id="m{position}">' for position in inside)
            document.append(html.escape(self._text(self.document, done, start)))
            document.append(marks + html.escape(self._text(self.document, start, end)) + "</span>" * len(inside))
            done = end
        document.append(html.escape(self._text(self.document, done, len(self.document))))
        answer, done = [], 0
        for token in range(len(self.answer) + 1):
            start, done = done, max(done, self._whole(self.answer, token)[1])
            answer.append(self._answer_token(token, self._text(self.answer, start, done)))
        data = {
            token: [[d.position, round(d.weight, 4), d.layer, d.head, round(d.score, 2)] for d in draws]
            for token, draws in self.draws.items()
        }
        parts = {"DATA": json.dumps(data), "ANSWER": "".join(answer), "DOCUMENT": "".join(document)}
        return re.sub("|".join(parts), lambda found: parts[found[0]], PAGE)  # at once: a text may hold these words

    def _answer_token(self, token: int, text: str) -> str:
        if not self.draws.get(token):
            return html.escape(text)
        text = html.escape(text) or (CONTINUED if token < len(self.answer) else "what comes next")
        return f'<button data-token="{token}" style="--w:{self.draws[token][0].weight:.3f}">{text}</button>'

    def _whole(self, ids: Sequence[int], at: int) -> tuple[int, int]:
        """The fewest of the `ids`, from which to which, that hold whole the characters that token `at` is part of."""
        around = [
            (start, end)
            for start in range(max(at - LONGEST + 1, 0), at + 1)
            for end in range(at + 1, min(at + LONGEST, len(ids)) + 1)
        ]
        for start, end in sorted(around, key=lambda span: span[1] - span[0]):
            if CUT not in self._decoded(ids[start:end]):
                return start, end
        return at, min(at + 1, len(ids))

    def _text(self, ids: Sequence[int], start: int, end: int) -> str:
        """What `ids[start:end]` add to a text, whatever is not known of it shown as such."""
        text = ""
        for known, places in itertools.groupby(range(start, end), key=lambda at: ids[at] != -1):
            inside = list(places)
            text += added(self.tokenizer, ids, inside[0], inside[-1] + 1) if known else UNKNOWN * len(inside)
        return text

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._text(ids, 0, len(ids))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What the answer drew on</title>
<style>
body { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem; margin: 0 2rem; height: 100vh }
body { font: 15px/1.5 sans-serif }
section { overflow: auto; padding: 1rem 0 }
pre { white-space: pre-wrap; font: 13px/1.6 monospace }
button { all: unset; cursor: pointer; white-space: pre-wrap; background: rgb(255 170 0 / calc(var(--w) * .6)) }
button:focus-visible, button[aria-pressed=true] { outline: 2px solid #06c }
span.drawn { background: rgb(255 120 0 / calc(.15 + var(--w) * .85)); outline: 1px solid #c60 }
</style>
<section aria-label="answer"><h2>Answer</h2><p>Choose a token; the darker, the more one head drew on one memory.</p>
<pre>
ANSWER</pre><ol id="draws"></ol></section>
<section aria-label="document"><h2>What was read</h2><pre>
DOCUMENT</pre></section>
<script>
const draws = DATA, list = document.getElementById("draws");
document.querySelectorAll("button").forEach(button => button.addEventListener("click", () => {
  document.querySelectorAll("button").forEach(other => other.setAttribute("aria-pressed", other === button));
  document.querySelectorAll("span.drawn").forEach(span => span.classList.remove("drawn"));
  list.replaceChildren(...draws[button.dataset.token].map(([position, weight, layer, head, score], rank) => {
    const span = document.getElementById("m" + position), item = document.createElement("li");
    item.textContent =
      `${(100 * weight).toFixed(0)} % of layer ${layer}, head ${head}, score ${score}: token ${position}`;
    if (span) {
      span.classList.add("drawn");
      span.style.setProperty("--w", weight);
      if (rank === 0) span.scrollIntoView({block: "center"});
    }
    return item;
  }));
}));
</script></html>
"""
