"""What an attached model remembers: what its user does with it."""

from __future__ import annotations

import contextlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...backends.errors import ArgumentError
from ...core import checks
from ...memory.rows import listed
from .document import Progress, read_in_windows, token_ids
from .explain import Explanation
from .forward import STATES, ForwardPasses
from .layer import LayerMemory
from .saved import Keeping
from .trace import Trace

ATTACHED = "perdure_memory"  # the attribute of an attached model that holds its memory


class ModelMemory(ForwardPasses, Keeping):
    """The memory of a model, as `attach` returns it.

    A segment is what one forward pass is given without a key-value cache. It is read against what was written before,
    and written when the whole model has read it. With a cache (`use_cache=True`, `generate`) the newest `window` tokens
    stay there, and what leaves it is remembered by the cache: the memory here is only read meanwhile. There is one
    forward pass at a time: while one thread is in it, another's is refused.

    Attributes
    ----------
    layers : dict of int to LayerMemory
    window : int
        Tokens `read_document` gives the model at once, and tokens that a cache keeps.
    settings : dict
        What `attach` was called with, as far as it says what is stored.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layers: dict[int, LayerMemory],
        attentions: dict[int, Any],
        *,
        window: int,
        limit: int | None,
        settings: dict[str, Any],
    ):
        super().__init__(model, layers, window, limit, settings)
        self.tokenizer, self.attentions = tokenizer, attentions
        self.last_trace: Trace | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values in all layers."""
        return sum(store.nbytes for layer in self.layers.values() for store in layer.stores.values())

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything, or everything of some `rows`, whose history then starts anew.

        Raises
        ------
        ArgumentError
            A row out of range; then nothing has been forgotten.
        """
        if rows is not None:
            staged = next((layer.staged for layer in self.layers.values() if layer.staged is not None), None)
            held = len(self.tokens) or (0 if staged is None else len(staged[0]))
            rows = listed(rows, held or sys.maxsize)
            self.settle()
        self.deferred = False
        self._drop_staged()
        self._state = next(STATES)
        if rows is None:
            self.following, self.history = None, []
        for layer in self.layers.values():
            layer.clear(rows)
        if rows is not None and self.following is not None:
            self.following = self.following.clone()
            self.following[rows] = 0
            for row in rows:
                self.history[row] = array("q")

    def read_document(
        self, text_or_ids: Any, progress: Progress = True, score: bool = False, retrieve: bool = True
    ) -> Any:
        """Read a document of any length, window by window, remembering all that `capacity` allows.

        Parameters
        ----------
        text_or_ids : str, or integers (n,) or (rows, n)
            Text needs the tokenizer given to `attach`. Where nothing was read before, it begins with the token that
            the tokenizer begins texts with, if there is one, as Llama's and Gemma's have; ids are read as they are.
        progress : bool or callable
            Show a progress bar on the terminal; or a function to call with the number of tokens of each window.
        score : bool
            Also score every token by what came before it.
        retrieve : bool
            False reads the document with no more than what is recent and the first tokens at hand, and remembers it all
            the same: many times faster, and no slower the longer it is. What is asked afterwards retrieves.

        Returns
        -------
        int or float32 tensor (rows, n)
            Tokens read, or with `score` the loss of every token in nats: -log p(token | window and memory); NaN for
            the first, which nothing predicts. Inside `frozen` every window is scored, and nothing is remembered.

        Raises
        ------
        ArgumentError, ShapeError
            Text without a tokenizer, ids that are not integers of at most two axes or that the model does not know,
            `score` for a model without a language-model head, nothing to do, as memory is frozen, or nobody to read,
            as it was detached.
        """
        self.attached()
        if self._frozen and not score:
            remedy = "Read outside of frozen(), or pass score=True."
            raise ArgumentError("read_document", "memory that may be written", "a frozen one", remedy)
        ids = token_ids(text_or_ids, self.tokenizer, opening=not any(self.history))
        known = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            received = f"ids from {int(ids.min())} to {int(ids.max())}"
            raise ArgumentError(
                "text_or_ids", f"ids from 0 to {known - 1}", received, "Pass ids of this model's tokenizer."
            )
        ids = ids.to(next(self.model.parameters()).device)
        heads = self.model.get_output_embeddings() is not None
        if score and not heads:
            remedy = "Attach memory to the model with its language-model head."
            raise ArgumentError("score", "a model that predicts tokens", type(self.model).__name__, remedy)
        keep = {} if score or not heads else {"logits_to_keep": 1}

        def forward(part: torch.Tensor, start: int) -> torch.Tensor:
            return self.model(input_ids=part, use_cache=False, **keep)[0]

        before, self.retrieving = self.retrieving, retrieve
        try:
            losses = read_in_windows(ids, self.window, forward, progress, score)
        finally:
            self.retrieving = before
        return losses if score else ids.shape[1]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Read without writing, inside the `with` block: many questions can then be asked about the same memory.

        An approximate index, and so `index="auto"`, goes on adapting to what is asked: the same question may find other
        neighbours when it is asked again. With `index="exact"` it finds the same.

        Raises
        ------
        ArgumentError
            The memory was detached.
        """
        self.attached()
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    @contextlib.contextmanager
    def tracing(self, keep: int = 1) -> Iterator[Trace]:
        """Record what every token draws from, the `keep` nearest memories of a head, inside the `with` block.

        Tokens are those that the model is given, but for drafts that assisted decoding rejects. In beam search, rows
        are beams as they stand at each step, which `explain` refuses to call a text.

        Raises
        ------
        ArgumentError
            The memory was detached, or `keep` is not positive.
        """
        self.attached()
        before, made = self.trace, Trace(keep)
        self.trace = made
        try:
            yield made
        finally:
            made.end()
            self.last_trace, self.trace = made, before

    def explain(self, token: int | None = None, row: int = 0, most: int = 5) -> Explanation:
        """What predicting a token drew on, by the trace at hand or the last one; print it, or write it as a page.

        Parameters
        ----------
        token : int, optional
            Number of the token among those traced; all of them by default. The token before it predicted it. The
            number of traced tokens is that of the next one, which the last predicted and the model was not given.
        row : int
            Of what was traced, such as the first of several questions about one document.
        most : int
            Memories named for a token.

        Raises
        ------
        ArgumentError
            No tokenizer is attached, nothing was traced, not that token or row, or a beam search.
        """
        trace = self.trace or self.last_trace
        if self.tokenizer is None or trace is None or not trace.tokens:
            expected, received = "a tokenizer and a trace", "no tokenizer" if self.tokenizer is None else "no trace"
            remedy = "Pass attach(model, tokenizer=...), and call the model inside memory.tracing()."
            raise ArgumentError("explain", expected, received, remedy)
        if trace.reordered:
            remedy = "Search outside of memory.tracing(), then call the model with the answer inside it."
            raise ArgumentError("explain", "rows that are each one text", "beams, which change places", remedy)
        if checks.count("row", row, least=0) >= trace.rows:
            raise ArgumentError("row", f"a number below {trace.rows}", repr(row), "Name a row that was traced.")
        every = range(1, trace.tokens + 1)
        chosen = every if token is None else [checks.count("token", token, most=trace.tokens)]
        document, drawn = trace.told(row)
        draws = {t: drawn(t - 1)[: checks.count("most", most)] for t in chosen}
        return Explanation(document, trace.ids(row), draws, self.tokenizer)

    def attached(self) -> None:
        """Whether the model still has this memory.

        Raises
        ------
        ArgumentError
            It was detached.
        """
        if getattr(self.model, ATTACHED, None) is not self:
            remedy = "Call attach(model), and use the memory that it returns."
            raise ArgumentError("memory", "that of a model it is attached to", "one that was detached", remedy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refused: the copy of a model would still write to this memory."""
        raise ArgumentError("model", "one without memory to copy", "one with memory", "Call detach(model) first.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a model is pickled without memory, which `save` keeps."""
        remedy = "Call detach(model) first; memory.save and model.save_pretrained keep both."
        raise ArgumentError("model", "one without memory to pickle", "one with memory", remedy)
