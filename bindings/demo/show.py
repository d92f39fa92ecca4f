"""The demo itself: read the document in every way, one after another, and show what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...backends.errors import FileError
from ..arguments import folder_to_write
from ..pretrained import Pretrained
from ..transformers.attach import SINKS
from ..transformers.document import token_ids
from .inputs import Document, Settings
from .methods import Result, with_cache, with_memory, without_memory
from .report import remembered, save_plot, table


def show(pretrained: Pretrained, document: Document, settings: Settings) -> list[Result]:
    """Read, print the table and what was remembered, save the plot.

    Parameters
    ----------
    pretrained : Pretrained
        Any causal model of transformers with its tokenizer.
    document : Document
    settings : Settings

    Returns
    -------
    list of Result
        In the order of the table.

    Raises
    ------
    FileError, ArgumentError
        A document of less than two windows, a layer the model does not have, a folder that cannot be written.
    """
    ids = token_ids(document.text, pretrained.tokenizer)[:, : settings.tokens]
    if ids.shape[1] < 2 * settings.window:
        expected = f"a text of at least {2 * settings.window} tokens"
        raise FileError("--file", expected, f"{document.name} with {ids.shape[1]}", "Name a longer text.")
    settings.fits(pretrained.model.config.num_hidden_layers)
    folder_to_write("--output", settings.output)

    n = ids.shape[1]
    print(f"{pretrained.name} reads {n} tokens of {document.name} in windows of {settings.window}")
    results = read_every_way(pretrained.model, ids, settings)
    print()
    print(table(results, settings.window))
    print()
    print(remembered(results, ids[0], pretrained.tokenizer, settings.window))
    print(f"\nplot saved: {save_plot(results, settings, document.name)}")
    return results


def read_every_way(model: Any, ids: torch.Tensor, settings: Settings) -> list[Result]:
    """No memory; the previous window, without and with the first tokens; perdure at each size; and full attention
    where the model's context allows it."""
    window, n, context = settings.window, ids.shape[1], model.config.max_position_embeddings
    chosen = settings.layers if settings.layers == "all" else list(settings.layers)
    common: dict[str, Any] = {"layers": chosen, "k": settings.k, "positions": "true" if n <= context else "clamped"}
    ways: list[tuple[Callable[..., Result], dict[str, Any]]] = [
        (without_memory, {}),
        (with_cache, {"keep": window}),
        (with_cache, {"keep": window, "sinks": SINKS}),
    ]
    for size in settings.memory:
        ways.append((with_memory, {"capacity": size, "trace": size == max(settings.memory), **common}))
    if n <= context:
        ways.append((with_cache, {}))
    else:
        print(f"full attention is left out: the model's context ends at {context} tokens")

    from tqdm.auto import tqdm

    results = []
    with tqdm(total=len(ways) * n, unit=" tokens", disable=None, leave=False) as bar:
        for i, (way, options) in enumerate(ways):
            bar.set_description(f"{i + 1} of {len(ways)}")
            results.append(way(model, ids, window, bar.update, **options))
    return results
