"""Prefetches rows that memory layers are predicted to read, so that reads overlap compute."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from engine.model.layers import DecoderLayer
from engine.model.memory_layer import MemoryLayer
from memory_ops import operations
from memory_ops.tables.value_table import ValueTable

# a disk's queue is full with the rows of this many tokens
_MOST_TOKENS = 32


@dataclass(frozen=True)
class LookaheadConfig:
    """How early rows are predicted, and how many.

    A memory layer's rows follow from the residual stream that enters its feed-forward. The stream
    that enters an earlier layer is similar: the memory layer's own norm, query and subkeys choose
    many of the same rows from it.

    Attributes:
        distance: layers that run between prediction and read, the memory's own included.
        candidates: rows predicted per head.

    Raises:
        ValueError: a field is out of range.
    """

    distance: int
    candidates: int

    def __post_init__(self) -> None:
        if self.distance < 1:
            raise ValueError(f"distance: must be 1 or more, not {self.distance}")
        if self.candidates < 1:
            raise ValueError(f"candidates: must be 1 or more, not {self.candidates}")


@dataclass(frozen=True)
class PredictedMemory:
    """A memory layer as the lookahead sees it, however an executor computes it.

    Attributes:
        index: its layer's place in the model.
        num_subkeys: N.
        tables: the tables that it reads.
        half_scores: half scores ``[T, H, 2, N]`` from the residual stream ``[T, D]``.
    """

    index: int
    num_subkeys: int
    tables: tuple[ValueTable, ...]
    half_scores: Callable[[Tensor], Tensor]

    def rows(self, residual_TD: Tensor, candidates: int) -> Tensor:
        """The ``candidates`` rows per head that the layer would choose from a residual stream."""
        rows_THK, _ = operations.product_topk(
            self.half_scores(residual_TD), min(candidates, self.num_subkeys)
        )
        return rows_THK


def predicted_memories(layers: Iterable[DecoderLayer]) -> list[PredictedMemory]:
    """The memory layers among a model's decoder layers."""
    return [
        _predicted(layer, layer.feed_forward)
        for layer in layers
        if isinstance(layer.feed_forward, MemoryLayer)
    ]


class Lookahead:
    """Hints to tables which rows may be read soon. A wrong prediction changes no result."""

    def __init__(self, memories: Iterable[PredictedMemory], config: LookaheadConfig) -> None:
        """Predict for those of the memory layers whose tables fetch rows."""
        self._candidates = config.candidates
        self._memories: dict[int, list[PredictedMemory]] = {}
        for memory in memories:
            if any(table.fetched_capacity is not None for table in memory.tables):
                first = max(0, memory.index + 1 - config.distance)
                self._memories.setdefault(first, []).append(memory)

    @property
    def layers(self) -> frozenset[int]:
        """The layers before which there is something to predict."""
        return frozenset(self._memories)

    def before(self, layer: int, residual_TD: Tensor) -> None:
        """Predict from the residual stream that enters a layer, for the first tokens of many."""
        for memory in self._memories.get(layer, ()):
            rows_THK = memory.rows(residual_TD[:_MOST_TOKENS], self._candidates)
            for table in memory.tables:
                table.hint(rows_THK, memory.index)


def _predicted(layer: DecoderLayer, memory: MemoryLayer) -> PredictedMemory:
    def half_scores(residual_TD: Tensor) -> Tensor:
        return memory.half_scores(layer.post_attention_layernorm(residual_TD))

    return PredictedMemory(memory.index, memory.num_subkeys, memory.tables, half_scores)
