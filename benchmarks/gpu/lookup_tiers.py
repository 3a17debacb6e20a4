"""Times lookups of one table in each GPU tier: device memory, host memory, cached host memory.

CUDA graphs capture all lookups. Every replay reads tokens that no earlier replay read.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from benchmarks import kernel_peers
from benchmarks.drawn_tables import PLAIN, drawn_rows, repeated
from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.graph_timing import replayed_us
from benchmarks.kernel_shapes import Shapes
from benchmarks.memory.access import DrawnAccess, RecordedAccess, RowAccess
from benchmarks.row_trace import AccessTrace
from engine.errors import ConfigError
from memory_ops import triton_kernels
from memory_ops.checks import Table
from memory_ops.row_formats import RowFormat, RowRecords
from memory_ops.tables.host import HostTable, host_table
from memory_ops.tables.table_statistics import TableStatistics

_WARM_UP_TOKENS = 32  # per lookup
_REPLAYED_TOKENS = 512  # per replay, all lookups together

Lookup = Callable[[Tensor, Tensor], object]


def names_of(shapes: Shapes, dtype: str, skew: str, tokens: int) -> list[str]:
    """Names of the figures of one point: microseconds by tier and backend, and a hit rate.

    ``host``: the GPU reads host memory in place; ``cached``: the host tier.
    """
    where = f"{skew} {dtype} {tokens} tokens of {shapes.num_rows} x {shapes.width}"
    names = [f"gather {tier} triton {where}" for tier in ("device", "host", "cached")]
    if dtype in PLAIN:
        names.append(f"gather device torch {where}")
    return [*names, f"hit rate {where}"]


class Tiers:
    """A table on the host and a copy on the device; every measurement gets a new cache."""

    def __init__(
        self,
        shapes: Shapes,
        dtype: str,
        cache_share: float,
        trace: AccessTrace,
        limits: CardLimits,
    ) -> None:
        self._shapes, self._dtype, self._limits = shapes, dtype, limits
        self._rows_RB = repeated(drawn_rows(dtype, shapes.width), shapes.num_rows)
        self._device_table = self._table(self._rows_RB.cuda())
        self._cache_bytes = int(self._rows_RB.nbytes * cache_share)
        self._num_layers = trace.rows_TMHK.shape[1]
        self._half_length = len(trace.rows_TMHK) // 2
        heads = (shapes.num_heads, shapes.top_k)
        self._access: dict[str, RowAccess] = {
            "uniform": DrawnAccess(shapes.num_rows, heads, is_zipf=False),
            "recorded": RecordedAccess(trace, shapes.num_rows),
        }

    def figures(self, skew: str, tokens: int) -> Iterator[Figure]:
        """Time lookups of ``tokens`` tokens in every tier, and with torch's embedding bag.

        Bounds count repeated rows.

        Raises:
            ConfigError: ``cache_share`` is too small.
        """
        replay_rows = self._timed_rows(skew, tokens)
        device_table, host_rows = self._device_table, self._table(self._rows_RB)
        device, host, cached, *torch_name, hits = names_of(self._shapes, self._dtype, skew, tokens)
        num_bytes = replay_rows[0][0].numel() * self._rows_RB[0].nbytes
        in_device, over_bus = num_bytes / self._limits.device, num_bytes / self._limits.bus

        def timed(name: str, us: float, bound_ns: float) -> Figure:
            return Figure(name, us, "us", bound_ns / 1e3)

        gather = partial(triton_kernels.gather_rows, device_table)
        yield timed(device, _us(gather, replay_rows), in_device)
        for name in torch_name:
            assert isinstance(device_table, Tensor)
            bag = kernel_peers.gathers(device_table, self._dtype)["torch"]
            yield timed(name, _us(bag, replay_rows), in_device)
        table = self._warm_table(host_rows, skew)
        try:
            gather = partial(triton_kernels.gather_rows, host_rows)
            yield timed(host, _us(gather, replay_rows), over_bus)
            us, hit_rate = _cached_us(table, replay_rows)
            yield timed(cached, us, over_bus)
            yield Figure(hits, hit_rate, "of rows")
        finally:
            table.close()

    def _table(self, rows_RB: Tensor) -> Table:
        if self._dtype in PLAIN:
            return rows_RB
        return RowRecords(rows_RB, cast(RowFormat, self._dtype), self._shapes.width)

    def _warm_table(self, rows: Table, skew: str) -> HostTable:
        """A host table whose cache has read the first half of the access pattern."""
        try:
            table = host_table(rows, self._cache_bytes, torch.device("cuda", 0))
        except ValueError as error:
            raise ConfigError(f"cache_share: {error}") from None
        weights = torch.rand(self._shapes.per_row_shape(_WARM_UP_TOKENS), device="cuda")
        for first in range(0, self._half_length - _WARM_UP_TOKENS + 1, _WARM_UP_TOKENS):
            positions = range(first, first + _WARM_UP_TOKENS)
            for layer in range(self._num_layers):
                rows_THK = self._rows(skew, positions, layer, warm_up=True)
                table.start(rows_THK.cuda(), weights).finish()
        return table

    def _timed_rows(self, skew: str, tokens: int) -> list[Tensor]:
        """Rows ``[C, T, H, K]`` of each replay: C lookups in the order of steps, then layers."""
        steps = max(1, _REPLAYED_TOKENS // (tokens * self._num_layers))
        return [
            torch.stack(
                [
                    self._rows(skew, positions, layer)
                    for positions in replay
                    for layer in range(self._num_layers)
                ]
            ).cuda()
            for replay in timed_positions(self._half_length, tokens, self._shapes.rounds + 1, steps)
        ]

    def _rows(
        self, skew: str, positions: Sequence[int], layer: int, *, warm_up: bool = False
    ) -> Tensor:
        access = self._access[skew]
        return torch.stack(
            [access.rows(0, position, layer, warm_up=warm_up) for position in positions]
        )


def timed_positions(
    num_positions: int, tokens: int, replays: int, steps: int
) -> list[list[list[int]]]:
    """Trace positions to read, per replay, per step of a replay and per token.

    Each token of a step belongs to another sequence. The sequences divide the trace evenly and do
    not overlap. No position occurs twice. If the trace is too short, the result has fewer steps,
    then fewer replays.
    """
    length = num_positions // tokens
    replays = min(replays, length)
    steps = min(steps, length // replays)
    return [
        [
            [sequence * length + replay * steps + step for sequence in range(tokens)]
            for step in range(steps)
        ]
        for replay in range(replays)
    ]


def _cached_us(table: HostTable, replay_rows: Sequence[Tensor]) -> tuple[float, float]:
    """Microseconds per lookup and the cache hit rate of the timed replays."""
    counts: list[TableStatistics] = []

    def count() -> None:
        torch.cuda.synchronize()  # statistics of an idle device are exact
        counts.append(table.statistics()[0])

    us = _us(lambda rows, weights: table.start(rows, weights).finish(), replay_rows, count)
    count()
    before, after = counts
    hits, unique = after.hits - before.hits, after.unique_rows - before.unique_rows
    return us, hits / unique


def _us(
    look_up: Lookup, replay_rows: Sequence[Tensor], after_warm_up: Callable[[], None] = lambda: None
) -> float:
    """Microseconds per lookup; calls ``after_warm_up`` after the first replay."""
    rows_CTHK = replay_rows[0].clone()
    weights_CTHK = torch.rand(rows_CTHK.shape, device="cuda")
    lookups = [
        partial(look_up, rows, weights)
        for rows, weights in zip(rows_CTHK, weights_CTHK, strict=True)
    ]

    def refresh(number: int) -> None:
        rows_CTHK.copy_(replay_rows[number])
        if number == 1:
            after_warm_up()

    return replayed_us(lookups, len(replay_rows) - 1, refresh)
