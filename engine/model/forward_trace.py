"""Optional record of a forward: rows that memory layers read, and router logits."""

from typing import NamedTuple

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
