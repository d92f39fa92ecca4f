"""Reading a document in windows, and scoring its tokens, with any model: with memory, without, with a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...backends.errors import ArgumentError, ShapeError

Progress = bool | Callable[[int], Any]  # show a bar or not; or what to call with the tokens of each window


def token_ids(text_or_ids: Any, tokenizer: Any, opening: bool = False) -> torch.Tensor:
    """Text or integers as ids (rows, n); an `opening` text begins with what the tokenizer begins texts with.

    Raises
    ------
    ArgumentError, ShapeError
    """
    if isinstance(text_or_ids, str):
        if tokenizer is None:
            remedy = "Pass attach(model, tokenizer=...), or token ids."
            raise ArgumentError("text_or_ids", "token ids, as no tokenizer is attached", "text", remedy)
        ids = tokenizer(text_or_ids, add_special_tokens=False, verbose=False)["input_ids"]
        first = getattr(tokenizer, "bos_token_id", None)
        begins = opening and first is not None and list(tokenizer("")["input_ids"])[:1] == [first]
        text_or_ids = [first, *ids] if begins and list(ids[:1]) != [first] else ids
    try:
        ids = torch.as_tensor(text_or_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError("text_or_ids", "text or token ids", str(error), "Pass a str or integers.") from error
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ArgumentError("text_or_ids", "text or token ids", f"numbers of {ids.dtype}", "Pass a str or integers.")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or 0 in ids.shape:
        raise ShapeError("text_or_ids", "ids (n,) or (rows, n), n at least 1", str(tuple(ids.shape)), "Pass more text.")
    return ids.to(torch.int64)


@contextlib.contextmanager
def advancing(n: int, progress: Progress) -> Iterator[Callable[[int], Any]]:
    """What to call with the number of tokens of each window; shows a bar of n tokens where `progress` is True."""
    if callable(progress):
        yield progress
        return
    from tqdm.auto import tqdm

    hidden = None if progress else True  # None: hidden where there is no terminal
    with tqdm(total=n, unit=" tokens", desc="reading", disable=hidden, leave=False) as bar:
        yield bar.update


@torch.inference_mode()
def read_in_windows(
    ids: torch.Tensor,
    window: int,
    forward: Callable[[torch.Tensor, int], torch.Tensor],
    progress: Progress,
    score: bool,
) -> torch.Tensor | None:
    """Give `ids` (rows, n) to a model one window after another; with `score`, the loss of every token (rows, n).

    `forward(ids of the window, start)` gives the logits of the window, which starts at token `start` of the document.
    The last logits of one window score the first token of the next; nothing scores the very first, which is NaN.
    """
    losses, last = [torch.full((ids.shape[0], 1), torch.nan)], None
    with advancing(ids.shape[1], progress) as advance:
        for start in range(0, ids.shape[1], window):
            part = ids[:, start : start + window]
            logits = forward(part, start)
            if score:
                if last is not None:
                    losses.append(token_losses(last, part[:, :1]))
                losses.append(token_losses(logits[:, :-1], part[:, 1:]))
                last = logits[:, -1:].clone()  # a view would keep all logits alive
            advance(part.shape[1])
    return torch.cat([loss.cpu() for loss in losses], dim=1) if score else None


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of `targets` (rows, n) under `logits` (rows, n, vocabulary), float32."""
    right = logits.gather(2, targets[..., None])[..., 0]
    return logits.float().logsumexp(dim=2) - right.float()
