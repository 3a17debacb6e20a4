"""What a forward tells, when asked, about what its layers chose."""

from typing import NamedTuple

from torch import Tensor


class MemoryTrace(NamedTuple):
    """What one memory layer read: int64 ``rows_THK`` and their ``weights_THK``, ``[T, H, K]``."""

    rows_THK: Tensor
    weights_THK: Tensor


class ForwardTrace:
    """Filled by layers, in their order.

    Attributes:
        memory: of each memory layer.
        router_logits: of each mixture of experts, ``[T, E]``.
    """

    def __init__(self) -> None:
        self.memory: list[MemoryTrace] = []
        self.router_logits: list[Tensor] = []
