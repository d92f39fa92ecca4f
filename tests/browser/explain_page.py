"""The page of an explanation in headless Chromium: its script runs, and a click highlights what the token drew on.

Run by `nox -s browser`, and by name only: it fails where there is no Chromium.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

from decoders import hostile_explanation

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CLICK = """<script>
const button = document.querySelector('button[data-token="1"]');
button.click();
const drawn = [...document.querySelectorAll("span.drawn")];
document.body.dataset.report = JSON.stringify({
  pressed: button.getAttribute("aria-pressed"),
  drawn: drawn.map(span => [span.id, span.textContent, span.style.getPropertyValue("--w")]),
  shown: drawn.map(span => getComputedStyle(span).backgroundColor),
  list: [...document.querySelectorAll("#draws li")].map(item => item.textContent),
  texts: [...document.querySelectorAll("pre")].map(pre => pre.textContent),
  errors: errors,
});
</script>"""
LISTEN = "<script>const errors = []; addEventListener('error', event => errors.push(event.message));</script>"


def chromium(*arguments: str) -> str:
    """What headless Chromium prints."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program is not None, "needs Chromium: install it (apt-get install chromium), then run nox -s browser"
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000")
    return subprocess.run([program, *quiet, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_click_highlights_what_the_token_drew_on(tmp_path):
    told = hostile_explanation()
    page = told.save_html(tmp_path / "page.html")
    content = page.read_text("utf-8").replace("<script>", LISTEN + "<script>", 1).replace("</html>", CLICK + "</html>")
    (tmp_path / "clicked.html").write_text(content, "utf-8")
    dumped = chromium("--dump-dom", (tmp_path / "clicked.html").as_uri())
    report = json.loads(html.unescape(re.search(r'data-report="([^"]*)"', dumped)[1]))
    document = told.tokenizer.decode(told.document)
    assert report["errors"] == []
    assert report["pressed"] == "true"
    assert report["drawn"] == [["m3", document[3], "0.25"], ["m40", document[40], "0.75"]]
    assert report["shown"][0] != report["shown"][1] != "rgba(0, 0, 0, 0)"
    assert report["list"] == [
        "75 % of layer 3, head 2, score 5.5: token 40",
        "25 % of layer 0, head 1, score 4.5: token 3",
    ]
    assert report["texts"] == [told.tokenizer.decode(told.answer), document]


def test_the_page_can_be_seen(tmp_path):
    page = hostile_explanation().save_html(tmp_path / "page.html")
    chromium(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,600", page.as_uri())
    assert (tmp_path / "page.png").stat().st_size > 5_000
