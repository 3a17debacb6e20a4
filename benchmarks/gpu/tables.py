"""Part tables: decode of Llama-3-8B's shape with memory layers, by place and size of the table."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.engine_rounds import EngineRounds
from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.drawn_engine import ENGINE, warm_rounds
from benchmarks.gpu.drawn_models import GPU, drawn_model, drawn_table
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.host_rows import HostRows
from benchmarks.gpu.part import PartSetup, Task
from benchmarks.gpu.recordings import STEPS, recording
from benchmarks.gpu.replayed_tables import (
    ReplayedDeviceTable,
    ReplayedDiskTable,
    ReplayedHostTable,
)
from benchmarks.gpu.roofline import Roofline, measured_rate
from benchmarks.gpu.row_replay import RowReplay
from benchmarks.gpu.table_layouts import DISK, HBM, TableLayout, dense_figure, layouts
from benchmarks.memory_variant import MEMORY_LAYERS, NUM_HEADS, TOP_K, with_memory
from benchmarks.model_shapes import LLAMA_8B_SHAPE
from benchmarks.row_trace import AccessTrace, checked_trace
from engine.executors.lookahead import LookaheadConfig
from memory_ops.checks import Table
from memory_ops.tables.row_cache import rows_memory
from memory_ops.tables.table_statistics import TableStatistics

ReplayedTable = ReplayedDeviceTable | ReplayedHostTable | ReplayedDiskTable

_CONTEXT = 512
# sizes that the sweep over sizes compares
_LEAST_BITS, _MOST_BITS = 18, 24
# recorded steps that the engine reads before the timed ones
_UNTIMED = 7
_DENSE_STEPS = 32
_WARM_TOKENS = 32  # of a lookup that warms the cache


def tasks(setup: PartSetup) -> Iterator[Task]:
    """A task per table and executor, the dense model first, and the ratios at the end."""
    trace = checked_trace(setup.trace_file, (MEMORY_LAYERS, NUM_HEADS, TOP_K))
    host_rows = HostRows()
    yield Task(tuple(map(dense_figure, STEPS)), partial(_dense, setup.limits))
    found = list(layouts(is_core=setup.is_core))
    for layout in found:
        yield MemoryRun(setup.limits, trace, host_rows, layout).task
    host_rows.close()
    for layout in found:
        for skew, batch in layout.points:
            figure = layout.figure(skew, batch)
            if layout.place == HBM:
                against = dense_figure(batch)
            elif layout.bits == _MOST_BITS:
                against = replace(layout, bits=_LEAST_BITS).figure(skew, batch)
            else:
                against = layout.in_hbm.figure(skew, batch)
            yield from ratios(setup, figure, against)


def ratios(setup: PartSetup, figure: str, against: str) -> Iterator[Task]:
    """A task that divides a figure by another one, if both are known."""
    if setup.value(figure) is not None and setup.value(against) is not None:
        yield Task((f"{figure} / {against}",), partial(_ratio, setup, figure, against))


def _dense(limits: CardLimits, wanted: Sequence[str]) -> Iterator[Figure]:
    roofline = Roofline(LLAMA_8B_SHAPE, limits)
    rounds = warm_rounds(drawn_model(LLAMA_8B_SHAPE, torch.bfloat16))
    for batch in STEPS:
        if dense_figure(batch) in wanted:
            steps = rounds.decode(batch, _CONTEXT, _DENSE_STEPS)
            bound = roofline.tokens_per_s(steps)
            yield Figure(dense_figure(batch), measured_rate(steps), "tokens/s", bound)


def _ratio(setup: PartSetup, figure: str, against: str, wanted: Sequence[str]) -> Iterator[Figure]:
    value, base = setup.value(figure), setup.value(against)
    assert value is not None and base is not None
    yield Figure(wanted[0], value / base, "ratio")


class MemoryRun:
    """Measures the points of one layout on one engine; part disk makes other tables."""

    def __init__(
        self, limits: CardLimits, trace: AccessTrace, host_rows: HostRows, layout: TableLayout
    ) -> None:
        self._limits, self._trace = limits, trace
        self._host_rows, self._layout = host_rows, layout
        self._config = with_memory(LLAMA_8B_SHAPE, 2 ** (layout.bits // 2))

    @property
    def task(self) -> Task:
        """The task of all figures of the layout."""
        names = [self._layout.figure(*point) for point in self._layout.points]
        if self._layout.place != HBM:
            names += [f"{name} hit rate" for name in names]
        return Task(tuple(names), self.run)

    def run(self, wanted: Sequence[str]) -> Iterator[Figure]:
        """Yield the wanted figures.

        Raises:
            Skipped: the table does not fit in the host's memory, or on its disk.
        """
        config, layout = self._config, self._layout
        replay = RowReplay(
            config.memory_layers,
            (NUM_HEADS, TOP_K),
            GPU,
            num_steps=max(STEPS.values()),
            num_sequences=max(STEPS),
            num_tokens=ENGINE.max_batched_tokens,
        )
        table = self._table(replay)
        model = drawn_model(config, torch.bfloat16)
        model.attach_tables(dict.fromkeys(config.table_names, table))
        lookahead = LookaheadConfig(layout.lookahead, TOP_K // 2) if layout.lookahead else None
        rounds = warm_rounds(model, lookahead)
        for skew in layout.skews:
            is_warm = False
            for batch in layout.batches:
                name = layout.figure(skew, batch)
                if name in wanted or f"{name} hit rate" in wanted:
                    rows = recording(self._trace, skew, table.num_rows, batch)
                    if not is_warm:
                        self._warm(table, rows.warm_NMHK)
                        is_warm = True
                    torch.cuda.synchronize()
                    replay.load(*rows)
                    torch.cuda.synchronize()
                    yield from self._point(rounds, table, name, batch)

    def _table(self, replay: RowReplay) -> ReplayedTable:
        layout, width = self._layout, self._config.hidden_size
        num_rows = 2**layout.bits
        if layout.place == HBM:
            return ReplayedDeviceTable(drawn_table(num_rows, width, torch.bfloat16), replay)
        rows = self._host_rows.get(num_rows, layout.dtype, width)
        return ReplayedHostTable(rows, layout.cached_share, GPU, self._config.num_layers, replay)

    def _warm(self, table: ReplayedTable, warm_NMHK: Tensor) -> None:
        """Read rows into the cache, as steps of a few tokens do."""
        if not isinstance(table, ReplayedDeviceTable):
            for first in range(0, len(warm_NMHK), _WARM_TOKENS):
                part_NMHK = warm_NMHK[first : first + _WARM_TOKENS]
                for memory, layer in enumerate(self._config.memory_layers):
                    table.warm(part_NMHK[:, memory].contiguous().to(GPU), layer)

    def _point(
        self, rounds: EngineRounds, table: ReplayedTable, name: str, batch: int
    ) -> Iterator[Figure]:
        before: list[TableStatistics] = []

        def count() -> None:
            if not before:
                before.append(_totals(table))

        steps = rounds.decode(batch, _CONTEXT, STEPS[batch] - _UNTIMED, count)
        # the device was idle before the first step: that call waited for none, the next for a part
        timed = steps[2:]
        read = _totals(table).since(before[0])
        roofline = Roofline(self._config, self._limits, row_bytes=_row_bytes(table.rows))
        bound = roofline.tokens_per_s(timed, read.misses * len(timed) / len(steps))
        # the limits of the disk are not measured
        known = None if self._layout.place == DISK else bound
        yield Figure(name, measured_rate(timed), "tokens/s", known)
        if not isinstance(table, ReplayedDeviceTable):
            yield Figure(f"{name} hit rate", read.hits / read.unique_rows, "of rows")


def _totals(table: ReplayedTable) -> TableStatistics:
    """The statistics of an idle device, which are exact."""
    torch.cuda.synchronize()
    return TableStatistics.sum(table.statistics().values())


def _row_bytes(rows: Table) -> int:
    memory_RC = rows_memory(rows)
    return memory_RC.shape[1] * memory_RC.itemsize
