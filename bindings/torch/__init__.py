"""PyTorch layers with memory. Memory is explicit: `output, memory = layer(x, memory)`.

A layer's state_dict holds parameters only; what it remembers is a state of its own, which no `.half()`, no broadcast of
buffers and no load_state_dict can touch.
"""

from ...backends.registry import load

load("torch")  # or MissingPackageError; and now, because torch.compile traces no import later

from .compressive import CompressiveAttention, CompressiveState  # noqa: E402
from .continuous import ContinuousAttention, ContinuousState  # noqa: E402
from .knn_state import KNNState  # noqa: E402
from .memorizing import MemorizingAttention  # noqa: E402
from .scope import MemoryScope  # noqa: E402
from .segments import SegmentedAttention  # noqa: E402
from .state import State  # noqa: E402
from .transformer import MemoryTransformer  # noqa: E402
from .transformer_xl import RecurrentState, TransformerXLAttention  # noqa: E402

__all__ = [
    "CompressiveAttention",
    "CompressiveState",
    "ContinuousAttention",
    "ContinuousState",
    "KNNState",
    "MemorizingAttention",
    "MemoryScope",
    "MemoryTransformer",
    "RecurrentState",
    "SegmentedAttention",
    "State",
    "TransformerXLAttention",
]
