"""The memory of a MemorizingAttention: a window of tensors, and a kNN memory of what left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from ...backends.errors import ArgumentError
from ...memory.knn import KNNMemory
from ...memory.state import pack, unpack
from .ops import Ledger
from .state import State


@dataclass(frozen=True, eq=False)
class KNNState(State):
    """The window's keys and values, and the kNN memory of what left it.

    Attributes
    ----------
    keys, values : tensors (rows, kv_heads, window, head_dim)
        The newest tokens, as memory would store them.
    ahead : tensor (rows, kv_heads, 1 or 0, head_dim)
        What the newest token projects, of which the key of the next is made; only kept where keys="before".
    token : int64 tensor (2,)
        Which state of the memory this is.
    ledger : Ledger
        Holds the KNNMemory itself; shared by the successive states of one memory.
    """

    keys: torch.Tensor
    values: torch.Tensor
    ahead: torch.Tensor
    token: torch.Tensor
    ledger: Ledger

    @property
    def memory(self) -> KNNMemory:
        """The kNN memory, to look at: it holds what has left the window, as of the latest call."""
        return self.ledger.memory

    @property
    def tokens(self) -> np.ndarray:
        """Tokens retrievable now, int64 (rows,)."""
        return self.memory.tokens

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.memory.nbytes

    def _remade(self, rows: list[int]) -> dict[str, Any]:
        self._newest()
        ledger = self.ledger.copy(rows)
        return {"ledger": ledger, "token": ledger.token()}

    def _newest(self) -> None:
        """The kNN memory is as this state left it, or an ArgumentError is raised."""
        self.ledger.newest(int(self.token[1]), "Copy, select or save a state before it is passed to a layer.")

    def state_dict(self) -> dict[str, torch.Tensor]:
        self._newest()
        stored = self.memory.state_dict().items()
        return {
            **super().state_dict(),
            **{f"memory.{name}": torch.from_numpy(np.asarray(array)) for name, array in stored},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        parts = cls._parts(state)
        stored = {name.removeprefix("memory."): a for name, a in state.items() if name.startswith("memory.")}
        ledger = Ledger.of(KNNMemory.from_state_dict(stored), parts["settings"])
        return cls(**parts, ledger=ledger, token=ledger.token())

    @classmethod
    def _joined(cls, states: list[Self], parts: dict[str, torch.Tensor]) -> dict[str, Any]:
        for state in states:
            state._newest()
        ledger = Ledger.of(joined([state.memory for state in states]), states[0].settings)
        return {**parts, "ledger": ledger, "token": ledger.token()}

    @classmethod
    def _made(cls) -> set[str]:
        return {"ledger", "token"}


def joined(memories: list[KNNMemory]) -> KNNMemory:
    """One memory with copies of the rows of all, which are alike but for their rows."""
    configs, arrays, written, rows = [], {}, [], 0
    for memory in memories:
        config, own = unpack("KNNMemory", memory.state_dict())
        written.append(own.pop("written"))
        for name, array in own.items():  # rows.0.keys, ...
            lead, row, rest = name.split(".", 2)
            arrays[f"{lead}.{int(row) + rows}.{rest}"] = array
        rows += config.pop("rows")
        configs.append(config)
    if any(config != configs[0] for config in configs):
        raise ArgumentError("states", "kNN memories of one configuration", str(configs), "Join those of one layer.")
    state = pack("KNNMemory", {**configs[0], "rows": rows}, {**arrays, "written": np.concatenate(written)})
    return KNNMemory.from_state_dict(state)
