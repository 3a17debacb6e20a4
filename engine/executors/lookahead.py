"""Prefetches rows that memory layers are predicted to read, so that reads overlap compute."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from engine.model.layers import DecoderLayer
from engine.model.memory_layer import MemoryLayer
from engine.model.norm import RmsNorm
from memory_ops import operations
from memory_ops.tables.value_table import ValueTable

# the rows of this many tokens fill a disk's queue
_MAX_TOKENS = 32


@dataclass(frozen=True)
class LookaheadConfig:
    """Distance and number of row predictions; ValueError if a field is out of range.

    A memory layer computes its rows from the residual stream that enters its feed-forward. The
    stream that enters an earlier layer is similar: applied to it, the memory layer's norm, query
    and subkeys choose many of the same rows.

    Attributes:
        distance: layers between prediction and read, the memory's own layer included.
        candidates: rows predicted per head.
    """

    distance: int
    candidates: int

    def __post_init__(self) -> None:
        for name, value in (("distance", self.distance), ("candidates", self.candidates)):
            if value < 1:
                raise ValueError(f"{name}: must be 1 or more, not {value}")


@dataclass(frozen=True)
class PredictedMemory:
    """A memory layer as the lookahead needs it, for every executor.

    ``index`` is its layer's index, ``num_subkeys`` N; ``half_scores`` maps a residual stream
    ``[T, D]`` to half scores ``[T, H, 2, N]``.
    """

    index: int
    num_subkeys: int
    tables: tuple[ValueTable, ...]
    half_scores: Callable[[Tensor], Tensor]

    def rows(self, residual_TD: Tensor, candidates: int) -> Tensor:
        """The ``candidates`` rows per head that the layer would choose from a residual stream."""
        scores_TH2N = self.half_scores(residual_TD)
        return operations.product_topk(scores_TH2N, min(candidates, self.num_subkeys))[0]


def predicted_memories(layers: Iterable[DecoderLayer]) -> list[PredictedMemory]:
    """The memory layers among a model's decoder layers."""
    return [
        _predicted(layer.post_attention_layernorm, layer.memory)
        for layer in layers
        if layer.memory is not None
    ]


class Lookahead:
    """Tells tables which rows will probably be read. A wrong prediction changes no result."""

    def __init__(self, memories: Iterable[PredictedMemory], config: LookaheadConfig) -> None:
        """Predict rows of the memory layers whose tables fetch rows."""
        self._candidates = config.candidates
        self._memories: dict[int, list[PredictedMemory]] = {}
        for memory in memories:
            if any(table.fetched_capacity is not None for table in memory.tables):
                first = max(0, memory.index + 1 - config.distance)
                self._memories.setdefault(first, []).append(memory)

    @property
    def layers(self) -> frozenset[int]:
        """Indices of the layers before which rows are predicted."""
        return frozenset(self._memories)

    def before(self, layer: int, residual_TD: Tensor) -> None:
        """Predict rows of the first tokens from the residual stream that enters a layer."""
        for memory in self._memories.get(layer, ()):
            rows_THK = memory.rows(residual_TD[:_MAX_TOKENS], self._candidates)
            for table in memory.tables:
                table.hint(rows_THK, memory.index)


def _predicted(norm: RmsNorm, memory: MemoryLayer) -> PredictedMemory:
    def half_scores(residual_TD: Tensor) -> Tensor:
        return memory.half_scores(norm(residual_TD))

    return PredictedMemory(memory.index, memory.num_subkeys, memory.tables, half_scores)
