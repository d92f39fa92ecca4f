"""What answers drew on, for a person to read: printed, or as an HTML page that highlights memories in their text."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...backends.errors import FileError
from .trace import Draw

AROUND = 12  # tokens shown on each side of a memory


@dataclass(frozen=True)
class Explanation:
    """Some tokens, and the memories that predicting each of them drew on.

    Attributes
    ----------
    document : sequence of int
        Ids of all that was read, memories first; positions of draws count in it.
    answer : sequence of int
        Ids of the tokens that were traced.
    draws : dict of int to list of Draw
        For some of these tokens, by their number, the memories that its prediction drew on, strongest first.
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
            told = self._text(self.answer[token : token + 1])
            lines.append(f"token {token}, {told!r}, drew on" if token < len(self.answer) else "what comes next drew on")
            lines += [
                f"  {d.weight:4.0%}  layer {d.layer}, head {d.head}, score {d.score:.1f}  {self.passage(d)}"
                for d in draws
            ]
            lines += [] if draws else ["  nothing remembered"]
        return "\n".join(lines)

    def passage(self, draw: Draw) -> str:
        """The text around the memory of a `draw`, which stands between guillemets, on one line."""
        at = draw.position
        parts = (
            self.document[max(at - AROUND, 0) : at],
            self.document[at : at + 1],
            self.document[at + 1 : at + 1 + AROUND],
        )
        before, here, after = (self._text(part).replace("\n", "⏎") for part in parts)
        return f"token {at}: …{before}«{here}»{after}…"

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
        document, end = [], 0
        for position in drawn:
            document.append(html.escape(self._text(self.document[end:position])))
            document.append(
                f'<span id="m{position}">{html.escape(self._text(self.document[position : position + 1]))}</span>'
            )
            end = position + 1
        document.append(html.escape(self._text(self.document[end:])))
        answer = [self._answer_token(token) for token in range(len(self.answer))]
        data = {
            token: [[d.position, round(d.weight, 4), d.layer, d.head, round(d.score, 2)] for d in draws]
            for token, draws in self.draws.items()
        }
        parts = {"DATA": json.dumps(data), "ANSWER": "".join(answer), "DOCUMENT": "".join(document)}
        return re.sub("|".join(parts), lambda found: parts[found[0]], PAGE)  # at once: a text may hold these words

    def _answer_token(self, token: int) -> str:
        text = html.escape(self._text(self.answer[token : token + 1]))
        if not self.draws.get(token):
            return text
        return f'<button data-token="{token}" style="--w:{self.draws[token][0].weight:.3f}">{text}</button>'

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i >= 0])  # -1 was given as embeddings


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
<pre>ANSWER</pre><ol id="draws"></ol></section>
<section aria-label="document"><h2>What was read</h2><pre>DOCUMENT</pre></section>
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
