"""Long-term memory for Hugging Face decoders, without changing their weights: attach, read a document, detach.

    from perdure.bindings.transformers import attach, detach
    memory = attach(model, tokenizer=tokenizer)
    memory.read_document(text)          # window by window, far past the context the model can hold at once
    model(question)                     # every attached layer also attends to what was read
    detach(model)

Needs `pip install "perdure[transformers]"`.
"""

from ...backends.arrays import optional_import
from ...backends.errors import BackendError

OLDEST = (5, 0)  # of transformers: the first with both attention interfaces in the form used here

for _package in ("torch", "transformers"):
    optional_import(_package, extra="transformers")


def _check_version(found: str) -> None:
    """The installed version of transformers is one that memory can be attached to."""
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError("transformers", f"version {oldest} or newer", found, "Run: pip install 'transformers>=5.0'")


_check_version(optional_import("transformers", extra="transformers").__version__)

from .attach import attach, detach  # noqa: E402
from .explain import Explanation  # noqa: E402
from .memory import ModelMemory  # noqa: E402
from .trace import Trace  # noqa: E402

__all__ = ["Explanation", "ModelMemory", "Trace", "attach", "detach"]
