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

OLDEST, BELOW = (5, 0), (6, 0)  # of transformers: from the first with both attention interfaces in the form used here

for _package in ("torch", "transformers"):
    optional_import(_package, extra="transformers")


def _check_version(found: str) -> None:
    """The installed version of transformers is one that memory can be attached to."""
    if not OLDEST <= tuple(map(int, found.split(".")[:2])) < BELOW:
        oldest, below = (".".join(map(str, version)) for version in (OLDEST, BELOW))
        remedy = "Run: pip install 'transformers>=5.0,<6'"
        raise BackendError("transformers", f"version {oldest} or newer, below {below}", found, remedy)


_check_version(optional_import("transformers", extra="transformers").__version__)

from .attach import attach, detach  # noqa: E402
from .explain import Explanation  # noqa: E402
from .memory import ModelMemory  # noqa: E402
from .trace import Trace  # noqa: E402

__all__ = ["Explanation", "ModelMemory", "Trace", "attach", "detach"]
