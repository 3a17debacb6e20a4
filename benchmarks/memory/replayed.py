"""A value table that replaces the requested rows by those of an access pattern."""

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory.access import RowAccess
from memory_ops.checks import Table
from memory_ops.native.row_fetcher import (
    ALL_THERE,
    FINISH,
    ON_PROGRESS,
    RELEASE,
    START,
    RowFetcher,
)
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import Lookup, RowSource, TableReadError

_WARM_SEQUENCES = 8


class Replay:
    """Selects the rows that each step reads, layer by layer.

    ``prepare`` selects the rows of a timed step. Steps without it, such as those of an untimed
    prompt, read the first token's rows for all their tokens.

    Attributes:
        layers: layer indices of the memory layers.
        peer_layers: those of them that read the same rows of two tables, one after the other.
        access: the access pattern; may be changed between steps.
        error: the exception that a native callback could not raise.
    """

    def __init__(
        self,
        layers: Sequence[int],
        access: RowAccess,
        recall: float | None = None,
        candidates: float = 1.0,
        *,
        peer_layers: Collection[int] = (),
    ) -> None:
        """``layers``: layer indices of the memory layers, ascending. A lookup's prediction contains
        the fraction ``recall`` of its rows, and ``candidates`` times as many rows in all; without
        ``recall`` nothing is predicted."""
        self.layers, self.peer_layers = tuple(layers), frozenset(peer_layers)
        self.access = access
        self.error: BaseException | None = None
        self._recall, self._candidates = recall, candidates
        self._position = 0
        self._prepared: dict[int, Tensor] = {}
        self._predictions: dict[int, list[Tensor]] = {}
        self._generator = torch.Generator().manual_seed(0)

    def begin(self, position: int) -> None:
        """Continue every sequence from ``position``."""
        self._position = position
        self._prepared.clear()

    def prepare(
        self, sequences: Sequence[int], num_tokens: int = 1, *, warm_up: bool = False
    ) -> None:
        """Select the rows and predictions of the next step: ``num_tokens`` per sequence.

        Call it outside the timing. ``warm_up`` selects rows that differ from the timed ones.
        """
        places = range(self._position, self._position + num_tokens)
        for memory, layer in enumerate(self.layers):
            parts = [
                self.access.rows(one, at, memory, warm_up=warm_up)
                for one in sequences
                for at in places
            ]
            self._prepared[layer] = torch.stack(parts)
            if self._recall is not None and num_tokens == 1:  # prompts have no predictions
                predictions = [
                    self._predict(one, len(sequences), rows, memory, self._recall)
                    for one, rows in zip(sequences, parts, strict=True)
                ]
                # the lookahead gives every table of a layer the same hint
                num_tables = 2 if layer in self.peer_layers else 1
                self._predictions[layer] = [torch.cat(predictions)] * num_tables
        self._position += num_tokens

    def rows(self, num_tokens: int, layer: int) -> Tensor:
        """The rows ``[T, H, K]`` of the step's next ``num_tokens`` tokens in this layer."""
        prepared_THK = self._prepared.get(layer)
        if prepared_THK is None:
            rows_HK = self.access.rows(0, self._position, self.layers.index(layer))
            return rows_HK.expand(num_tokens, *rows_HK.shape).contiguous()
        if num_tokens > len(prepared_THK):
            raise ValueError(f"replay: {num_tokens} tokens requested, {len(prepared_THK)} prepared")
        return prepared_THK[:num_tokens]

    def advance(self, num_tokens: int, layer: int) -> None:
        """Move past ``num_tokens`` tokens, whose rows were looked up in this layer."""
        if layer in self._prepared:
            self._prepared[layer] = self._prepared[layer][num_tokens:]

    def predictions(self, layer: int) -> Tensor | None:
        """Take the predicted rows of a layer's next lookup in one table; None during a prompt."""
        left = self._predictions.get(layer)
        return left.pop() if left else None

    def _predict(
        self, sequence: int, batch: int, rows_HK: Tensor, memory: int, recall: float
    ) -> Tensor:
        """Some of the rows, and wrong ones: rows that other sequences read at this position."""
        correct = rows_HK[torch.rand(rows_HK.shape, generator=self._generator) < recall]
        others = [sequence + batch * (1 + i) for i in range(int(self._candidates) + 1)]
        wrong = [self.access.rows(one, self._position, memory).flatten() for one in others]
        most = round(rows_HK.numel() * self._candidates)
        return torch.cat([correct, *wrong])[:most]


class ReplayedTable:
    """Forwards lookups with the rows of a replay, and hints with its predictions.

    Attributes:
        table: the table that reads the rows.
    """

    def __init__(
        self,
        table: DeviceTable | DiskTable,
        replay: Replay,
        layers: Sequence[int] | None = None,
    ) -> None:
        """``layers``: layer indices of the memory layers that read this table; None for all."""
        self.table, self._replay = table, replay
        self._layers = replay.layers if layers is None else tuple(layers)
        self.tier, self.num_rows, self.value_dim = table.tier, table.num_rows, table.value_dim
        self.fetched_capacity = table.fetched_capacity

    def row_source(self, layer: int) -> RowSource | None:
        source = self.table.row_source(layer)
        return None if source is None else ReplayedRows(source, self._replay, layer)

    @property
    def fault(self) -> str | None:
        return self.table.fault

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        replayed_THK = self._replay.rows(len(rows_THK), layer)
        self._replay.advance(len(rows_THK), layer)
        return self.table.start(replayed_THK, weights_THK, layer)

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        return self.table.start_dots(self._replay.rows(len(rows_THK), layer), x_TV, layer)

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        predictions = self._replay.predictions(layer)
        if predictions is not None:
            self.table.hint(predictions, layer)
        elif layer in self._replay.peer_layers:
            # PEER hints the rows that it reads next, while it waits for those of the other table
            self.table.hint(self._replay.rows(len(rows), layer), layer)

    def watch(self, on_progress: Callable[[], None]) -> None:
        self.table.watch(on_progress)

    def statistics(self) -> Mapping[int, TableStatistics]:
        return self.table.statistics()

    def warm_up(self, num_rows: int) -> None:
        """Look up warm-up rows until ``num_rows`` missed, or 4 times as many were looked up."""
        access = self._replay.access
        before, num_looked_up, position = self._num_missed(), 0, 0
        while self._num_missed() - before < num_rows and num_looked_up < 4 * num_rows:
            for layer in self._layers:
                memory = self._replay.layers.index(layer)
                parts = [
                    access.rows(one, position, memory, warm_up=True)
                    for one in range(_WARM_SEQUENCES)
                ]
                rows_THK = torch.stack(parts)
                self.table.start(rows_THK, torch.ones(rows_THK.shape), layer).finish()
                num_looked_up += rows_THK.numel()
            position += 1

    def _num_missed(self) -> int:
        return sum(counts.misses for counts in self.table.statistics().values())


class ReplayedRows:
    """A table's row source whose fetcher replaces the rows asked for by those of the replay."""

    def __init__(self, source: RowSource, replay: Replay, layer: int) -> None:
        self.rows: Table = source.rows
        self._source = source
        address = source.fetcher_address
        own = None if address is None else RowFetcher.from_address(address)
        self._calls = _calls(own, replay)
        addresses = (ctypes.cast(call, ctypes.c_void_p).value for call in self._calls)
        self._fetcher = RowFetcher(*addresses, None if own is None else own.own, layer)
        self.fetcher_address = ctypes.addressof(self._fetcher)

    def check(self) -> None:
        self._source.check()

    def read_error(self, row: int, error: int) -> TableReadError:
        if self._source.fetcher_address is None:
            return TableReadError(f"replay: row {row} cannot be read ({error})")
        return self._source.read_error(row, error)

    def count(self, rows_THK: Tensor) -> None:
        """Nothing to do: these are not the rows that were read."""


def _calls(own: RowFetcher | None, replay: Replay) -> tuple[Any, ...]:
    """The functions of a fetcher before ``own``, or before rows in place; none may raise."""
    own_start = START(own.start) if own is not None else None

    def start(
        rows_of: int, rows: int, tokens: int, token_rows: int, is_new: int, layer: int, slots: int
    ) -> int:
        try:
            # the later parts of a split lookup keep the rows of the first part
            if is_new:
                played = replay.rows(tokens, layer)
                if played[0].numel() != token_rows:
                    raise ValueError(f"replay: {played[0].numel()} rows a token, not {token_rows}")
                replay.advance(tokens, layer)
                ctypes.memmove(rows, played.data_ptr(), played.nbytes)
            if own_start is None:
                ctypes.memmove(slots, rows, 8 * tokens * token_rows)
                return tokens
            return int(own_start(rows_of, rows, tokens, token_rows, is_new, layer, slots))
        except BaseException as error:  # KeyboardInterrupt too; the caller raises it later
            replay.error = error
            return 0

    if own is None:
        return (
            START(start),
            FINISH(lambda rows_of, slots, count, layer, error: ALL_THERE),
            RELEASE(lambda rows_of, slots, count: None),
            ON_PROGRESS(lambda: None),
        )
    return (START(start), FINISH(own.finish), RELEASE(own.release), ON_PROGRESS(own.on_progress))
