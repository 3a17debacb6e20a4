"""Part disk: decode of Llama-3-8B's shape with its table on disk, next to the host tier."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.drawn_models import GPU
from benchmarks.gpu.host_rows import HostRows
from benchmarks.gpu.part import PartSetup, Task
from benchmarks.gpu.replayed_tables import ReplayedDiskTable
from benchmarks.gpu.row_file import DrawnRowFile
from benchmarks.gpu.row_replay import RowReplay
from benchmarks.gpu.table_layouts import DISK, TableLayout, disk_layouts
from benchmarks.gpu.tables import MemoryRun, ReplayedTable, ratios
from benchmarks.memory_variant import MEMORY_LAYERS, NUM_HEADS, TOP_K
from benchmarks.row_trace import AccessTrace, checked_trace
from memory_ops.page_lock import PageLock
from memory_ops.tables.row_cache import rows_memory


def tasks(setup: PartSetup) -> Iterator[Task]:
    """A task per layout, the host tier first, and its ratios at the end."""
    trace = checked_trace(setup.trace_file, (MEMORY_LAYERS, NUM_HEADS, TOP_K))
    host_rows, row_file = HostRows(), DrawnRowFile(setup.folder)
    host, *others = disk_layouts()
    yield MemoryRun(setup.limits, trace, host_rows, host).task
    host_rows.close()
    for layout in others:
        yield DiskRun(setup.limits, trace, host_rows, row_file, layout).task
    row_file.close()
    for layout in others:
        for skew, batch in layout.points:
            figure = layout.figure(skew, batch)
            yield from ratios(setup, figure, host.figure(skew, batch))
            if layout.is_whole:
                split = replace(layout, is_whole=False)
                yield from ratios(setup, split.figure(skew, batch), figure)


class DiskRun(MemoryRun):
    """Measures the points of a layout on disk."""

    def __init__(
        self,
        limits: CardLimits,
        trace: AccessTrace,
        host_rows: HostRows,
        row_file: DrawnRowFile,
        layout: TableLayout,
    ) -> None:
        assert layout.place == DISK
        super().__init__(limits, trace, host_rows, layout)
        self._row_file = row_file

    def _table(self, replay: RowReplay) -> ReplayedTable:
        layout, width = self._layout, self._config.hidden_size
        disk = self._row_file.table(2**layout.bits, layout.dtype, width, layout.host_share)
        lock = PageLock(rows_memory(disk.slots), GPU)
        num_layers = self._config.num_layers
        return ReplayedDiskTable(
            disk, layout.cached_share, GPU, num_layers, replay, lock, is_whole=layout.is_whole
        )
