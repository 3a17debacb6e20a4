"""Guesses which rows memory layers are about to read, so that tables fetch them meanwhile."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from engine.model.memory_layer import MemoryLayer
from memory_ops import operations

# what more tokens would want to be fetched goes beyond what a disk has under way
_MOST_TOKENS = 32


@dataclass(frozen=True)
class LookaheadConfig:
    """How early rows are guessed, and how many.

    A memory layer's rows follow from the residual stream that enters its feed-forward. That which
    enters an earlier layer is much alike, and the layer's own norm, query and subkeys choose many
    of the same rows from it.

    Attributes:
        distance: layers that run between guess and reading, the memory's own, whose attention
            does, among them.
        candidates: rows a head that are guessed; as many as are read, or a few more.

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


class Lookahead:
    """Tells tables what memory layers may soon read. What it guesses changes no result."""

    def __init__(self, memories: Iterable[MemoryLayer], config: LookaheadConfig) -> None:
        """Look ahead for these memory layers, wherever tables fetch their rows."""
        self._candidates = config.candidates
        self._memories: dict[int, list[MemoryLayer]] = {}
        for memory in memories:
            if any(table.fetched_capacity is not None for table in memory.tables):
                first = max(0, memory.index + 1 - config.distance)
                self._memories.setdefault(first, []).append(memory)

    @property
    def layers(self) -> frozenset[int]:
        """The layers before which there is something to be guessed."""
        return frozenset(self._memories)

    def before(self, layer: int, residual_TD: Tensor) -> None:
        """Guess from what enters a layer; only the first tokens of many are looked at."""
        for memory in self._memories.get(layer, ()):
            rows_THK = guessed_rows(memory, residual_TD[:_MOST_TOKENS], self._candidates)
            for table in memory.tables:
                table.hint(rows_THK, memory.index)


def guessed_rows(memory: MemoryLayer, residual_TD: Tensor, candidates: int) -> Tensor:
    """The ``candidates`` rows a head that a memory layer would choose from what enters another."""
    candidates = min(candidates, memory.num_subkeys)
    rows_THK, _ = operations.product_topk(memory.half_scores(residual_TD), candidates)
    return rows_THK
