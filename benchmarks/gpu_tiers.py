"""One table where a GPU finds it: in its own memory, in the host's, and there behind a cache.

All lookups are captured in CUDA graphs, and every replay reads tokens that none before it read.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from benchmarks import kernel_peers
from benchmarks.access_trace import AccessTrace
from benchmarks.drawn_tables import PLAIN, drawn_rows, repeated
from benchmarks.gpu_result import GpuResult
from benchmarks.graph_timing import CopyLimits, replayed_us
from benchmarks.kernel_shapes import Shapes
from benchmarks.memory.access import DrawnAccess, RecordedAccess, RowAccess
from engine.errors import ConfigError
from memory_ops import triton_kernels
from memory_ops.checks import Table
from memory_ops.row_formats import RowFormat, RowRecords
from memory_ops.tables.host import HostTable, host_table
from memory_ops.tables.table_statistics import TableStatistics

_WARM_UP_TOKENS = 32  # of a lookup
_REPLAYED_TOKENS = 512  # of all lookups of a replay

Lookup = Callable[[Tensor, Tensor], object]


class Tiers:
    """A table's rows on the host and a copy of them on the device; caches are made anew."""

    def __init__(self, shapes: Shapes, dtype: str, cache_share: float, trace: AccessTrace) -> None:
        self._shapes, self._dtype = shapes, dtype
        self._rows_RB = repeated(drawn_rows(dtype, shapes.width), shapes.num_rows)
        self._there = self._table(self._rows_RB.cuda())
        self._cache_bytes = int(self._rows_RB.nbytes * cache_share)
        self._num_layers = trace.rows_TMHK.shape[1]
        self._positions = len(trace.rows_TMHK) // 2
        heads = (shapes.num_heads, shapes.top_k)
        self._access: dict[str, RowAccess] = {
            "uniform": DrawnAccess(shapes.num_rows, heads, is_zipf=False),
            "recorded": RecordedAccess(trace, shapes.num_rows),
        }

    def results(self, limits: CopyLimits, skew: str, tokens: int) -> Iterator[GpuResult]:
        """Time the lookups of so many tokens in every tier, and torch's bag beside them.

        Raises:
            ConfigError: the cache is too small.
        """
        drawn = self._timed_rows(skew, tokens)
        there, on_host = self._there, self._table(self._rows_RB)
        result = partial(self._result, limits, skew, drawn)
        yield result("device", _us(partial(triton_kernels.gather_rows, there), drawn))
        if isinstance(there, Tensor):
            bag = kernel_peers.gathers(there, self._dtype)["torch"]
            yield result("device", _us(bag, drawn), backend="torch")
        cached = self._warm_table(on_host, skew)
        try:
            yield result("host", _us(partial(triton_kernels.gather_rows, on_host), drawn))
            yield result("cached", *_cached_us(cached, drawn), cache_bytes=self._cache_bytes)
        finally:
            cached.close()

    def _result(
        self,
        limits: CopyLimits,
        skew: str,
        drawn: Sequence[Tensor],
        tier: str,
        us: float,
        hit_rate: float | None = None,
        *,
        backend: str = "triton",
        cache_bytes: int | None = None,
    ) -> GpuResult:
        return GpuResult(
            op="gather",
            tier=tier,
            backend=backend,
            skew=skew,
            tokens=drawn[0].shape[1],
            rows=self._shapes.num_rows,
            width=self._shapes.width,
            dtype=self._dtype,
            us=us,
            gb_per_s=drawn[0][0].numel() * self._rows_RB[0].nbytes / us / 1e3,
            limit_gb_per_s=limits.device if tier == "device" else limits.bus,
            device=torch.cuda.get_device_name(),
            replays=len(drawn) - 1,
            cache_bytes=cache_bytes,
            hit_rate=hit_rate,
        )

    def _table(self, rows_RB: Tensor) -> Table:
        if self._dtype in PLAIN:
            return rows_RB
        return RowRecords(rows_RB, cast(RowFormat, self._dtype), self._shapes.width)

    def _warm_table(self, rows: Table, skew: str) -> HostTable:
        """A host table whose cache has read all that is there to warm up with."""
        try:
            table = host_table(rows, self._cache_bytes, torch.device("cuda", 0))
        except ValueError as error:
            raise ConfigError(f"cache_share: {error}") from None
        weights = torch.rand(self._shapes.each_row(_WARM_UP_TOKENS), device="cuda")
        for first in range(0, self._positions - _WARM_UP_TOKENS + 1, _WARM_UP_TOKENS):
            places = range(first, first + _WARM_UP_TOKENS)
            for layer in range(self._num_layers):
                rows_THK = self._rows(skew, places, layer, warm_up=True)
                table.start(rows_THK.cuda(), weights).finish()
        return table

    def _timed_rows(self, skew: str, tokens: int) -> list[Tensor]:
        """Rows ``[C, T, H, K]`` of each replay: step by step, layer by layer."""
        steps = max(1, _REPLAYED_TOKENS // (tokens * self._num_layers))
        return [
            torch.stack(
                [
                    self._rows(skew, places, layer)
                    for places in replay
                    for layer in range(self._num_layers)
                ]
            ).cuda()
            for replay in timed_places(self._positions, tokens, self._shapes.rounds + 1, steps)
        ]

    def _rows(
        self, skew: str, places: Sequence[int], layer: int, *, warm_up: bool = False
    ) -> Tensor:
        access = self._access[skew]
        return torch.stack([access.rows(0, place, layer, warm_up=warm_up) for place in places])


def timed_places(num_places: int, tokens: int, replays: int, steps: int) -> list[list[list[int]]]:
    """Which places of a record are read: by replay, by step of a replay, a place a token.

    Tokens that are read at once are of sequences that begin evenly spread over the record, and end
    before the next begins. No place is read twice: where there are too few, there are fewer steps,
    then fewer replays.
    """
    length = num_places // tokens
    replays = min(replays, length)
    steps = min(steps, length // replays)
    return [
        [
            [sequence * length + replay * steps + step for sequence in range(tokens)]
            for step in range(steps)
        ]
        for replay in range(replays)
    ]


def _cached_us(table: HostTable, drawn: Sequence[Tensor]) -> tuple[float, float]:
    """Microseconds of a lookup, and the share of hits, of those replays that are timed."""
    counts: list[TableStatistics] = []

    def count() -> None:
        counts.append(table.statistics()[0])

    us = _us(lambda rows, weights: table.start(rows, weights).finish(), drawn, count)
    count()
    before, after = counts
    hits, unique = after.hits - before.hits, after.unique_rows - before.unique_rows
    return us, hits / unique


def _us(
    look_up: Lookup, drawn: Sequence[Tensor], when_warm: Callable[[], None] = lambda: None
) -> float:
    """Microseconds of a lookup; ``when_warm`` is called between the first replay and the rest."""
    rows_CTHK = drawn[0].clone()
    weights_CTHK = torch.rand(rows_CTHK.shape, device="cuda")
    lookups = [
        partial(look_up, rows, weights)
        for rows, weights in zip(rows_CTHK, weights_CTHK, strict=True)
    ]

    def refresh(number: int) -> None:
        rows_CTHK.copy_(drawn[number])
        if number == 1:
            when_warm()

    return replayed_us(lookups, len(drawn) - 1, refresh)
