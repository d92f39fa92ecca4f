"""What the demo shows: a table, a few memories beside the text that asked for them, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.arrays import optional_import
from ..transformers.explain import added
from .inputs import Settings
from .methods import Result

PASSAGES, AROUND, APART = 4, 12, 64  # how many to show, tokens shown on each side, tokens between two shown


def table(results: list[Result], window: int) -> str:
    """Perplexity after the first window and in the last quarter, seconds, and bytes kept of the past."""
    last_quarter = 3 * len(results[0].losses) // 4
    rows = [("", "perplexity", "last quarter", "seconds", "memory")]
    for r in results:
        scores = (f"{r.perplexity(window):.2f}", f"{r.perplexity(last_quarter):.2f}")
        rows.append((r.name, *scores, f"{r.seconds:.1f}", f"{r.nbytes / 2**20:.1f} MiB"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def remembered(results: list[Result], ids: torch.Tensor, tokenizer: Any, window: int) -> str:
    """The tokens that memory helped most, each with the memory that its prediction drew on.

    Helped is by how much the token is likelier than by any baseline but full attention. Some heads look at something
    remembered whatever the text; so, of all memories that a prediction drew on, the one shown is that whose weight
    stands out most from the usual one of the head that looked.
    """
    with_trace = next(r for r in results if r.trace is not None)
    others = torch.stack([r.losses for r in results if r.trace is None and r.name != "full attention"])
    best = torch.exp(-others).amax(dim=0)
    gain = (torch.exp(-with_trace.losses) - best).nan_to_num(-1.0)
    usual = with_trace.trace.usual()
    lines = ["what it remembered: tokens that became likely with memory, and the memory that stood out"]
    chosen: list[int] = []
    for token in gain.argsort(descending=True).tolist():
        if token < window or any(abs(token - other) < APART for other in chosen):
            continue
        draws = with_trace.trace.draws(token - 1)  # the token before predicts it
        if not draws:
            continue
        chosen.append(token)
        draw = max(draws, key=lambda d: d.weight - usual[d.layer, d.head])
        probabilities = f"{best[token]:.1%} at best without memory, {torch.exp(-with_trace.losses[token]):.1%} with it"
        lines += [
            "",
            f"  token {token}: probability {probabilities}",
            f"    read        {passage(ids, token, tokenizer, after=0)}",
            f"    remembered  {passage(ids, draw.position, tokenizer, after=AROUND)}",
            f"                token {draw.position}, layer {draw.layer}, head {draw.head}, "
            f"{draw.weight:.0%} of its attention",
        ]
        if len(chosen) == PASSAGES:
            break
    return "\n".join(lines)


def passage(ids: torch.Tensor, token: int, tokenizer: Any, after: int) -> str:
    """The text around one token, which stands between guillemets, on one line."""
    known, last = ids.tolist(), min(token + 1 + after, len(ids))
    spans = (max(token - AROUND, 0), token), (token, token + 1), (token + 1, last)
    before, here, rest = (added(tokenizer, known, *span).replace("\n", "⏎") for span in spans)
    return f"…{before}«{here}»{rest}" + ("…" if after else "")


def save_plot(results: list[Result], settings: Settings, title: str) -> Path:
    """Perplexity of every method, and how it develops along the document; drawn without a window or global state."""
    figure = optional_import("matplotlib.figure", extra="plot").Figure(figsize=(11, 4.5), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.6))
    names, values = [r.name for r in results], [r.perplexity(settings.window) for r in results]
    colours = [f"C{i}" for i in range(len(results))]
    drawn = bars.barh(names[::-1], values[::-1], color=colours[::-1])
    bars.bar_label(drawn, fmt="%.2f", padding=3)
    bars.margins(x=0.15)
    bars.set_xlabel(f"perplexity after the first {settings.window} tokens (lower is better)")
    for result, colour in zip(results, colours, strict=True):
        losses = result.losses[settings.window :].double().numpy()
        width = min(1024, max(len(losses) // 4, 1))
        smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        ends = settings.window + width + np.arange(len(smooth))
        curves.plot(ends, np.exp(smooth), color=colour)  # named by the bar of the same colour
    curves.set(xlabel="tokens read", ylabel=f"perplexity of the last {width} tokens", yscale="log")
    curves.yaxis.set_minor_formatter("{x:g}")
    curves.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(f"{Path(title).name}, {len(results[0].losses)} tokens", fontsize="medium")
    path = settings.output / "demo.png"
    figure.savefig(path, dpi=130)
    return path
