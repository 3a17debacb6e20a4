"""A table whose readers get other rows than they ask for: those of an access pattern."""

import ctypes
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.memory.access import RowAccess
from memory_ops.native.row_fetcher import START, RowFetcher
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import FetchedTable, Lookup, TableReadError, ValueTable


class ReplayedTable:
    """Passes lookups on with the rows of an access pattern, hints with some of them.

    A step of decoding takes one token of each sequence through all memory layers; a lookup of more
    tokens, as of a prompt, is not timed and reads the first one's rows for all.

    Attributes:
        table: where the rows are read.
        access: which they are; may be changed between steps.
        batch: sequences that decode together; likewise.
    """

    def __init__(
        self, table: ValueTable, layers: Sequence[int], access: RowAccess, recall: float
    ) -> None:
        """``layers`` are the memory layers, in their order; ``recall`` is that of hints."""
        self.table, self.access, self.batch = table, access, 1
        self.tier = table.tier
        self._layers, self._recall = tuple(layers), recall
        self._position = 0
        self._coming: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    @property
    def num_rows(self) -> int:
        return self.table.num_rows

    @property
    def value_dim(self) -> int:
        return self.table.value_dim

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        played_THK = self._played(len(rows_THK), layer)
        self._next(layer)
        return self.table.start(played_THK, weights_THK, layer)

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        return self.table.start_dots(self._played(len(rows_THK), layer), x_TV, layer)

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Pass on as many guesses, of which the share ``recall`` of the coming rows are right."""
        coming = self._played(len(rows), layer).flatten()
        is_right = torch.rand(coming.shape, generator=self._generator) < self._recall
        other = self.access.rows(self.batch, self._position, self._layers.index(layer)).flatten()
        wrong = other.repeat(-(-rows.numel() // len(other)))[: rows.numel() - int(is_right.sum())]
        self.table.hint(torch.cat([coming[is_right], wrong]), layer)

    def watch(self, on_progress: Callable[[], None]) -> None:
        self.table.watch(on_progress)

    def statistics(self) -> Mapping[int, TableStatistics]:
        return self.table.statistics()

    def prepare(self) -> None:
        """Find the coming step's rows now: what that takes is no part of a step."""
        for layer in self._layers:
            self._played(self.batch, layer)

    def warm_up(self, num_rows: int) -> None:
        """Read ahead of the coming steps until so many rows were read, or as many were found."""
        before, sequences = self._num_missed(), range(self.batch, self.batch + 8)
        most = max(1, 4 * num_rows // (8 * self._coming_rows() * len(self._layers)))
        for position in range(most):
            for memory, layer in enumerate(self._layers):
                parts = [self.access.rows(one, position, memory) for one in sequences]
                rows_THK = torch.stack(parts)
                self.table.start(rows_THK, torch.ones(rows_THK.shape), layer).finish()
            if self._num_missed() - before >= num_rows:
                break

    def _next(self, layer: int) -> None:
        """The rows of a layer were asked for: after the last one's comes the next step."""
        if layer == self._layers[-1]:
            self._position += 1
            self._coming.clear()

    def _num_missed(self) -> int:
        return sum(counts.misses for counts in self.table.statistics().values())

    def _coming_rows(self) -> int:
        return self.access.rows(0, 0, 0).numel()

    def _played(self, num_tokens: int, layer: int) -> Tensor:
        memory = self._layers.index(layer)
        if num_tokens != self.batch:
            rows_HK = self.access.rows(0, self._position, memory)
            return rows_HK.expand(num_tokens, *rows_HK.shape).contiguous()
        if layer not in self._coming:
            parts = [self.access.rows(one, self._position, memory) for one in range(self.batch)]
            self._coming[layer] = torch.stack(parts)
        return self._coming[layer]


class ReplayedFetches(ReplayedTable):
    """The same for a table that native kernels have rows fetched from."""

    def __init__(
        self, table: FetchedTable, layers: Sequence[int], access: RowAccess, recall: float
    ) -> None:
        super().__init__(table, layers, access, recall)
        self._fetched, self.slots = table, table.slots
        self._held: list[object] = []  # what fetchers point to

    def fetcher(self, layer: int) -> RowFetcher:
        """The table's own, told of the rows of the access pattern."""
        own = self._fetched.fetcher(layer)
        start = START(own.start)

        def replay(
            table: int, rows: int, tokens: int, num_rows: int, is_new: int, layer: int, slots: int
        ) -> int:
            # a lookup that was split goes on with what it was told first
            if is_new:
                played = self._played(tokens, layer)
                self._next(layer)
                ctypes.memmove(rows, played.data_ptr(), played.nbytes)
            done: int = start(table, rows, tokens, num_rows, is_new, layer, slots)
            return done

        replayed = START(replay)
        self._held += [own, replayed]
        address = ctypes.cast(replayed, ctypes.c_void_p).value
        return RowFetcher(address, own.finish, own.release, own.on_progress, own.own, own.layer)

    def check_file(self) -> None:
        self._fetched.check_file()

    def count(self, rows_THK: Tensor, layer: int) -> None:
        self._fetched.count(rows_THK, layer)

    def read_error(self, row: int, error: int) -> TableReadError:
        return self._fetched.read_error(row, error)
