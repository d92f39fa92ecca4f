"""Long-term memory for Hugging Face decoders, without changing their weights: attach, read a document, detach.

    from perdure.bindings.transformers import attach, detach
    memory = attach(model, tokenizer=tokenizer)
    memory.read_document(text)          # window by window, far past the context the model can hold at once
    model(question)                     # every attached layer also attends to what was read
    detach(model)

Needs `pip install "perdure[transformers]"`.
"""

from ...backends.arrays import optional_import

for _package in ("torch", "transformers"):
    optional_import(_package, extra="transformers")

from .attach import attach, detach  # noqa: E402
from .explain import Explanation  # noqa: E402
from .memory import ModelMemory  # noqa: E402
from .trace import Trace  # noqa: E402

__all__ = ["Explanation", "ModelMemory", "Trace", "attach", "detach"]
