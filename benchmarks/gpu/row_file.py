"""A large table in a file on the disk, shared by the tasks that read it."""

import os
import shutil
from pathlib import Path
from typing import cast

import torch

from benchmarks.drawn_tables import DRAWN_ROWS, PLAIN, drawn_rows
from benchmarks.gpu.part import Skipped
from memory_ops.row_formats import RowFormat
from memory_ops.tables.disk import DiskTable, row_cache_bytes

# free space of the disk for everything else
_RESERVE_BYTES = 2 * 2**30


class DrawnRowFile:
    """Writes the rows of one table at a time."""

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``, whose disk is measured; it must exist."""
        self._folder = folder
        self._file: Path | None = None

    def table(self, num_rows: int, dtype: str, width: int, host_share: float) -> DiskTable:
        """A table in a file, which the first call writes, with host memory for a share of the rows.

        Raises:
            Skipped: the disk has too little space.
        """
        part_PB = drawn_rows(dtype, width)
        size = part_PB.shape[1] * part_PB.itemsize
        file = self._folder / f"rows-{num_rows}-{dtype}-{width}"
        if file != self._file:
            self.close()
            self._check_space(num_rows * size)
            self._file = file
            content = part_PB.contiguous().view(torch.uint8).numpy()
            with open(file, "wb") as out:
                for first in range(0, num_rows, DRAWN_ROWS):
                    out.write(content[: num_rows - first].tobytes())
                out.flush()
                os.fsync(out.fileno())
        row_format = PLAIN[dtype] if dtype in PLAIN else cast(RowFormat, dtype)
        cache_bytes = row_cache_bytes(max(1, round(num_rows * host_share)), size, num_rows)
        return DiskTable(file, 0, (num_rows, width), row_format, cache_bytes)

    def close(self) -> None:
        """Delete the file."""
        file, self._file = self._file, None
        if file is not None:
            file.unlink(missing_ok=True)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if needed + _RESERVE_BYTES > free:
            gib = f"{needed / 2**30:.0f} GiB of disk space, {free / 2**30:.0f} GiB are free"
            raise Skipped(f"the table needs {gib}")
