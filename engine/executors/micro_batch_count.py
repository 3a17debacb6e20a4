"""Chooses how many micro-batches a step runs as, by the rows that an earlier step fetched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import ValueTable


@dataclass(frozen=True)
class SplitRule:
    """When a device gains from micro-batches, each of which reads all weights again.

    Attributes:
        counts: (minimum tokens of a step, micro-batches), the most tokens first.
        least_fraction: minimum fraction of a step's rows that are fetched.
        least_rows: minimum number of rows whose fetches overlap other layers, for each micro-batch
            after the first.
        most_references: rows, repeats included, that a lookup of one micro-batch fetches while
            other layers run; it fetches the rest while nothing runs. None: there is no limit.
        needs_slots: whether the lookups of all micro-batches are in flight together, so that the
            rows that one layer reads must fit in the table's slots.
    """

    counts: tuple[tuple[int, int], ...]
    least_fraction: float = 0.0
    least_rows: float = 0.0
    most_references: int | None = None
    needs_slots: bool = False

    def most(self, num_tokens: int) -> int:
        """The number of micro-batches of a step of this many tokens that fetches enough rows."""
        return next((count for least, count in self.counts if num_tokens >= least), 1)


class LayerReads(NamedTuple):
    """A memory layer reads ``references`` rows for a token from each of ``tables`` tables."""

    references: int
    tables: int


@dataclass(frozen=True)
class ModelReads:
    """The rows that a model's memory layers read, and how many of them its tables can hold.

    Attributes:
        layers: the reads of each memory layer.
        num_rows: rows of the largest table.
        capacity: rows that every table can hold at once; 0 unless all tables fetch their rows.
    """

    layers: tuple[LayerReads, ...]
    num_rows: int
    capacity: int

    @property
    def token_rows(self) -> int:
        """Rows that a token reads in all layers."""
        return sum(layer.references * layer.tables for layer in self.layers)

    def most(self, rule: SplitRule, num_tokens: int) -> int:
        """The number of micro-batches of a step that fetches all rows; see ``count``."""
        if not self.capacity:
            return 1
        references = max((layer.references for layer in self.layers), default=0)
        # a micro-batch could find no slot while others wait
        if rule.needs_slots and min(num_tokens * references, self.num_rows) > self.capacity:
            return 1
        return rule.most(num_tokens)

    def count(self, rule: SplitRule, num_tokens: int, fetched_fraction: float) -> int:
        """The number of micro-batches of a step that fetches this fraction of its rows.

        1 if more would not be faster.
        """
        count = self.most(rule, num_tokens)
        num_hidden = fetched_fraction * self._overlapping_rows(rule, num_tokens, count)
        if fetched_fraction < rule.least_fraction or num_hidden < (count - 1) * rule.least_rows:
            return 1
        return count

    def _overlapping_rows(self, rule: SplitRule, num_tokens: int, count: int) -> int:
        """Rows that a step of ``count`` micro-batches requests while other layers run."""
        most = rule.most_references
        if most is None:
            return num_tokens * self.token_rows
        return sum(
            min(num_tokens, count * (most // layer.references)) * layer.references * layer.tables
            for layer in self.layers
        )


class ReadingMemory(Protocol):
    """A memory layer: the tables that it reads, and the rows of each that a token reads."""

    @property
    def tables(self) -> tuple[ValueTable, ...]: ...
    @property
    def num_references(self) -> int: ...


class MicroBatchCount:
    """Decides for each step of a model whether it is split."""

    def __init__(self, memories: Sequence[ReadingMemory], rule: SplitRule) -> None:
        self._rule = rule
        tables = [table for memory in memories for table in memory.tables]
        self._tables = {id(table): table for table in tables}.values()
        self._fetched_fraction = 1.0  # of the rows requested by the last step of many tokens
        self._reads = ModelReads(
            tuple(LayerReads(memory.num_references, len(memory.tables)) for memory in memories),
            max((table.num_rows for table in tables), default=0),
            min((table.fetched_capacity or 0 for table in tables), default=0),
        )

    def limit(self, num_tokens: int) -> int:
        """An upper limit of ``of`` for at most this many tokens."""
        return self._rule.most(num_tokens) if self._reads.capacity else 1

    def most(self, num_tokens: int) -> int:
        """The number of micro-batches if all rows were fetched; see ``of``."""
        return self._reads.most(self._rule, num_tokens)

    def of(self, num_tokens: int) -> int:
        """The number of micro-batches for the next step; 1 if more would not be faster."""
        return self._reads.count(self._rule, num_tokens, self._fetched_fraction)

    @contextmanager
    def watched(self, num_tokens: int) -> Iterator[None]:
        """Wrap a step: a large step's fraction of fetched rows decides about the next step."""
        if not self._reads.capacity or num_tokens < self._rule.counts[-1][0]:
            yield
            return
        before = self._statistics()
        yield
        step = self._statistics().since(before)
        # padding requests rows too, but of these it misses none
        requested = num_tokens * self._reads.token_rows
        self._fetched_fraction = (step.misses + step.late) / requested

    def _statistics(self) -> TableStatistics:
        return TableStatistics.sum(
            [counts for table in self._tables for counts in table.statistics().values()]
        )
