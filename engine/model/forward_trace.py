"""Optional record of a forward: rows that memory layers read, and router logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MemoryTrace(NamedTuple):
    """Int64 ids and weights of the rows that one memory layer read, ``[T, H, K]``."""

    rows_THK: Tensor
    weights_THK: Tensor


class ForwardTrace:
    """Traces of all memory layers and router logits ``[T, E]`` of all mixtures, in layer order."""

    def __init__(self) -> None:
        self.memory: list[MemoryTrace] = []
        self.router_logits: list[Tensor] = []

    def extend_by_parts(self, parts: "Sequence[ForwardTrace]") -> None:
        """Add the traces of consecutive tokens, each of the same layers."""
        for reads in zip(*(part.memory for part in parts), strict=True):
            self.memory.append(MemoryTrace(*map(torch.cat, zip(*reads, strict=True))))
        for logits in zip(*(part.router_logits for part in parts), strict=True):
            self.router_logits.append(torch.cat(logits))
