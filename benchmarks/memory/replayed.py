"""A table whose readers get other rows than they ask for: those of an access pattern."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
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
    """Whose turn it is: a step takes tokens of some sequences through all layers.

    Steps that are timed are prepared. Others, as of a prompt before them, read the first token's
    rows for all.

    Attributes:
        access: which rows are read; may be changed between steps.
        error: what went wrong where it could not be raised.
    """

    def __init__(
        self, layers: Sequence[int], access: RowAccess, recall: float, candidates: float
    ) -> None:
        """``layers`` are the memory layers, in their order; of the rows that they read guesses
        hold the share ``recall``, in all ``candidates`` times as many rows."""
        self.layers = tuple(layers)
        self.access = access
        self.error: BaseException | None = None
        self._recall, self._candidates = recall, candidates
        self._position = 0
        self._coming: dict[int, Tensor] = {}
        self._guesses: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def begin(self, position: int) -> None:
        """Go on from a place of each sequence."""
        self._position = position
        self._coming.clear()

    def prepare(
        self, sequences: Sequence[int], num_tokens: int = 1, *, warm_up: bool = False
    ) -> None:
        """Find what the coming step reads, so many tokens of each sequence, and the guesses.

        That is no part of a step. ``warm_up``: such rows as are not timed.
        """
        places = range(self._position, self._position + num_tokens)
        for memory, layer in enumerate(self.layers):
            parts = [
                self.access.rows(one, at, memory, warm_up=warm_up)
                for one in sequences
                for at in places
            ]
            self._coming[layer] = torch.stack(parts)
            if self._recall and num_tokens == 1:  # those of a prompt are not guessed
                guesses = [
                    self._guess(one, len(sequences), rows, memory)
                    for one, rows in zip(sequences, parts, strict=True)
                ]
                self._guesses[layer] = torch.cat(guesses)
        self._position += num_tokens

    def rows(self, num_tokens: int, layer: int) -> Tensor:
        """What a lookup reads, ``[T, H, K]``: that of the next tokens of the step."""
        coming_THK = self._coming.get(layer)
        if coming_THK is None:
            rows_HK = self.access.rows(0, self._position, self.layers.index(layer))
            return rows_HK.expand(num_tokens, *rows_HK.shape).contiguous()
        if num_tokens > len(coming_THK):
            raise ValueError(
                f"replay: {num_tokens} tokens, of which {len(coming_THK)} are prepared"
            )
        return coming_THK[:num_tokens]

    def done(self, num_tokens: int, layer: int) -> None:
        """Note that so many tokens' rows were looked up: the next ones' come then."""
        if layer in self._coming:
            self._coming[layer] = self._coming[layer][num_tokens:]

    def guesses(self, layer: int) -> Tensor | None:
        """What was guessed of the rows of a layer's coming lookup; None while a prompt is run."""
        return self._guesses.pop(layer, None)

    def _guess(self, sequence: int, batch: int, rows_HK: Tensor, memory: int) -> Tensor:
        """Some of the rows, and for the rest those that other sequences read there."""
        right = rows_HK[torch.rand(rows_HK.shape, generator=self._generator) < self._recall]
        others = [sequence + batch * (1 + i) for i in range(int(self._candidates) + 1)]
        wrong = [self.access.rows(one, self._position, memory).flatten() for one in others]
        most = round(rows_HK.numel() * self._candidates)
        return torch.cat([right, *wrong])[:most]


class ReplayedTable:
    """Passes lookups on with the rows of a replay, and hints with its guesses.

    Attributes:
        table: where the rows are read.
    """

    def __init__(self, table: DeviceTable | DiskTable, replay: Replay) -> None:
        self.table, self._replay = table, replay
        self.tier, self.num_rows, self.value_dim = table.tier, table.num_rows, table.value_dim
        self.fetched_capacity = table.fetched_capacity

    def row_source(self, layer: int) -> RowSource | None:
        source = self.table.row_source(layer)
        return None if source is None else ReplayedRows(source, self._replay, layer)

    @property
    def fault(self) -> str | None:
        return self.table.fault

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        played_THK = self._replay.rows(len(rows_THK), layer)
        self._replay.done(len(rows_THK), layer)
        return self.table.start(played_THK, weights_THK, layer)

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        return self.table.start_dots(self._replay.rows(len(rows_THK), layer), x_TV, layer)

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        guesses = self._replay.guesses(layer)
        if guesses is not None:
            self.table.hint(guesses, layer)

    def watch(self, on_progress: Callable[[], None]) -> None:
        self.table.watch(on_progress)

    def statistics(self) -> Mapping[int, TableStatistics]:
        return self.table.statistics()

    def warm_up(self, num_rows: int) -> None:
        """Read other rows than are timed, until as many were read, or four times as many found."""
        access, layers = self._replay.access, self._replay.layers
        before, found, position = self._num_missed(), 0, 0
        while self._num_missed() - before < num_rows and found < 4 * num_rows:
            for memory, layer in enumerate(layers):
                parts = [
                    access.rows(one, position, memory, warm_up=True)
                    for one in range(_WARM_SEQUENCES)
                ]
                rows_THK = torch.stack(parts)
                self.table.start(rows_THK, torch.ones(rows_THK.shape), layer).finish()
                found += rows_THK.numel()
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
            # a lookup that was split goes on with what it was told first
            if is_new:
                played = replay.rows(tokens, layer)
                if played[0].numel() != token_rows:
                    raise ValueError(f"replay: {played[0].numel()} rows a token, not {token_rows}")
                replay.done(tokens, layer)
                ctypes.memmove(rows, played.data_ptr(), played.nbytes)
            if own_start is None:
                ctypes.memmove(slots, rows, 8 * tokens * token_rows)
                return tokens
            return int(own_start(rows_of, rows, tokens, token_rows, is_new, layer, slots))
        except BaseException as error:  # an interruption too: it is raised after the call
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
