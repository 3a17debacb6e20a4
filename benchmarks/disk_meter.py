"""Measures random reads of rows from the disk that has a model's tables."""

import time
from contextlib import closing
from pathlib import Path

from benchmarks.read_limits import random_reads_per_s
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import RingError, RowFile
from memory_ops.tables.table_file import TableFile
from server.plan.machine import DiskLimits
from weights.checkpoints.checkpoint import open_checkpoint

_DEPTHS = (64, 128, 256)
# reads of one measurement: at most these, and as many as are expected to take this time
_MOST_READS, _MOST_S = 20_000, 1.0
_READS_ALONE = 200


def disk_limits(location: RowFile) -> DiskLimits:
    """The limits of reading random rows of a file: of many in flight, and of one alone.

    A new seed for each measurement reads other rows, which the disk has not cached.

    Raises:
        ConfigError: memplus was installed without its native library.
        OSError: a read fails, or the kernel does not allow io_uring.
    """
    alone = random_reads_per_s(location, 1, _READS_ALONE, time.time_ns())
    several = random_reads_per_s(location, _DEPTHS[0], _READS_ALONE, time.time_ns())
    reads = min(_MOST_READS, max(_READS_ALONE, round(_MOST_S * several)))
    return DiskLimits(
        max(random_reads_per_s(location, depth, reads, time.time_ns()) for depth in _DEPTHS),
        1 / alone,
        "measured",
    )


def limits_of_tables(folder: Path) -> DiskLimits | None:
    """The limits of direct reads from the first table of a checkpoint folder.

    None if ``folder`` is a file, or has no tables, if io_uring is not available, or if the
    filesystem has no direct reads: reads from the page cache would not show the speed of the disk.

    Raises:
        CheckpointError, ConfigError, OSError: as ``open_checkpoint`` and ``disk_limits``.
    """
    if not folder.is_dir() or not disk_rows.is_available():
        return None
    checkpoint, stored = open_checkpoint(folder)
    if not checkpoint.model.table_names:
        return None
    table = stored[checkpoint.model.table_names[0]]
    num_rows = table.shape[0]
    with closing(TableFile(table.file, table.offset, table.num_bytes)) as file:
        if file.alignment == 1:
            return None
        row_bytes = table.num_bytes // num_rows
        location = RowFile(file.descriptor, table.offset, num_rows, row_bytes, file.alignment)
        try:
            return disk_limits(location)
        except RingError:
            return None
