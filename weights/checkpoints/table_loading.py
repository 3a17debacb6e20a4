"""Opens value tables for serving: loads and converts them into memory, or opens their files."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import MemoryConfig
from memory_ops.anonymous import anonymous_zeros
from memory_ops.native.disk_rows import is_available
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.value_table import TableReadError, ValueTable
from weights.checkpoints.device_loading import DeviceLoader, OnBytes
from weights.checkpoints.table_files import (
    RowLayout,
    converted_parts,
    requested_layout,
    stored_layout,
)
from weights.checkpoints.tensor_files import StoredTensor, checksum_key, read_parts
from weights.errors import CheckpointError

logger = logging.getLogger(__name__)

# tables smaller than this load too fast for a progress bar
_MIN_PROGRESS_BYTES = 256 * 2**20


def table_layouts(stored: Sequence[StoredTensor], dtype: str) -> dict[str, RowLayout]:
    """Layouts to serve tables in, by name, for a ``dtype`` of ``TABLE_DTYPES`` or auto (as stored).

    Raises:
        CheckpointError: a file does not describe its rows.
        ConfigError: the rows cannot be converted to ``dtype``.
    """
    chosen = None if dtype == "auto" else dtype
    return {one.name: requested_layout(one, chosen) for one in stored}


def load_tables(
    stored: Sequence[StoredTensor],
    layouts: Mapping[str, RowLayout],
    device: torch.device,
    *,
    verify: bool = False,
) -> dict[str, ValueTable]:
    """Tables of the device tier, by name; loading needs little memory beyond the tables.

    Args:
        stored: the tables.
        layouts: layouts to convert them to, by name.
        device: device in whose memory they lie.
        verify: compare their data with the checksums in their files.

    Raises:
        CheckpointError: a table cannot be read, fails its checksum, or a row cannot be converted.
        ConfigError: the system has not enough memory.
        torch.OutOfMemoryError: the GPU has not enough memory.
    """
    tables: dict[str, ValueTable] = {}
    with progress_bar("tables", stored) as progress:
        for one in stored:
            layout = layouts[one.name]
            if device.type == "cpu":
                rows = rows_in_memory(one, layout, "device", progress.update, verify=verify)
            else:
                rows = rows_on_device(one, layout, device, progress.update, verify=verify)
            tables[one.name] = DeviceTable(layout.table(rows))
    return tables


def open_tables(
    stored: Sequence[StoredTensor],
    layouts: Mapping[str, RowLayout],
    memory: MemoryConfig,
    cache_bytes: int,
    *,
    verify: bool = False,
    hot_rows: Mapping[str, Tensor] | None = None,
) -> dict[str, ValueTable]:
    """Tables of the disk tier, by name; they share the row cache evenly.

    Args:
        stored: the tables.
        layouts: layouts by name; must be the stored ones.
        memory: shapes of the memory layers.
        cache_bytes: bytes of row cache for all tables.
        verify: read all data once and compare them with the checksums in their files.
        hot_rows: row ids by table, most read first, with which the caches begin.

    Raises:
        CheckpointError: a file cannot be read by the disk tier, or fails its checksum.
        ConfigError: rows would have to be converted, or the cache cannot hold the rows that one
            token reads.
    """
    if not is_available():
        raise ConfigError("table_tier: disk needs the native library, which is not built")
    for one in stored:
        check_unconverted(one, layouts[one.name])
    share = cache_bytes // len(stored)
    opened = {one.name: _open(one, layouts[one.name], memory, share) for one in stored}
    if verify:
        check_checksums(stored)
    for name, rows in (hot_rows or {}).items():
        num_rows = min(len(rows), opened[name].num_slots)
        logger.info("%s: reading %d hot rows into its row cache", name, num_rows)
        opened[name].fill_cache(rows)
    return {**opened}


def check_unconverted(stored: StoredTensor, layout: RowLayout) -> None:
    """ConfigError unless a table is stored in ``layout``, as the disk tier needs it."""
    found = stored_layout(stored).name
    if found != layout.name:
        raise ConfigError(
            f"table_dtype: the disk tier cannot convert {found} rows to {layout.name}; run"
            f" `memplus quantize {stored.file.parent} DST --table-dtype {layout.name}`"
        )


def check_checksums(stored: Sequence[StoredTensor]) -> None:
    """Read tables, and keep nothing; CheckpointError unless the data match their checksums."""
    with progress_bar("checksums", stored) as progress:
        for one in stored:
            for part in read_parts(one, verify=True):
                progress.update(part.nbytes)


def rows_in_memory(
    stored: StoredTensor, layout: RowLayout, tier: str, on_bytes: OnBytes, *, verify: bool
) -> Tensor:
    """A table's rows in anonymous CPU memory on huge pages.

    Args:
        stored: the table.
        layout: layout to convert it to.
        tier: tier for which the rows are loaded, for errors.
        on_bytes: called with the bytes of each part of the file that was read.
        verify: compare its data with the checksum in its file.

    Raises:
        CheckpointError, ConfigError: as ``load_tables``.
    """
    rows = allocated_rows(layout, tier, stored.name)
    if layout == stored_layout(stored):
        # read in place
        for part in read_parts(stored, rows, verify=verify):
            on_bytes(part.nbytes)
    else:
        _fill(rows, stored, converted_parts(stored, layout, verify=verify), on_bytes)
    return rows


def allocated_rows(layout: RowLayout, tier: str, name: str) -> Tensor:
    """Zeros for the rows of a table in anonymous memory; ConfigError if there is too little."""
    try:
        return anonymous_zeros(layout.shape, layout.dtype)
    except OSError as error:
        problem = f"cannot allocate {layout.num_bytes} bytes for {name}: {error.strerror}"
        raise ConfigError(f"table_tier: {tier} {problem}") from None


def rows_on_device(
    stored: StoredTensor,
    layout: RowLayout,
    device: torch.device,
    on_bytes: OnBytes,
    *,
    verify: bool,
) -> Tensor:
    """A table's rows in a device's memory, copied part by part; arguments as ``rows_in_memory``.

    The device converts floating rows. The host quantises rows, which waits for each copy.

    Raises:
        CheckpointError: as ``load_tables``.
        torch.OutOfMemoryError: the device has not enough memory.
    """
    if layout.records is None or layout == stored_layout(stored):
        loader = DeviceLoader(device)
        rows = loader.load(stored, layout.dtype, on_bytes, verify=verify)
        loader.finish()
    else:
        rows = torch.empty(layout.shape, dtype=layout.dtype, device=device)
        _fill(rows, stored, converted_parts(stored, layout, verify=verify), on_bytes)
    return rows


def _fill(rows: Tensor, stored: StoredTensor, parts: Iterable[Tensor], on_bytes: OnBytes) -> None:
    first, row_bytes = 0, stored.num_bytes // stored.shape[0]
    for part in parts:
        # waits for the copy, so that the next part can reuse the buffer
        rows[first : first + len(part)].copy_(part)
        first += len(part)
        on_bytes(row_bytes * len(part))


def _open(
    stored: StoredTensor, layout: RowLayout, memory: MemoryConfig, cache_bytes: int
) -> DiskTable:
    row_format = layout.dtype if layout.records is None else layout.records[0]
    shape = stored.shape[0], memory.value_dim
    try:
        table = DiskTable(
            stored.file,
            stored.offset,
            shape,
            row_format,
            cache_bytes,
            checksum=stored.metadata.get(checksum_key(stored.name)),
        )
    except TableReadError as error:
        raise CheckpointError(f"tensor {stored.name}: {error}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_holds_a_token(table, memory, stored.name)
    return table


def check_holds_a_token(table: ValueTable, memory: MemoryConfig, name: str) -> None:
    """Raise ConfigError unless the table's row cache holds the rows that one token reads."""
    rows_per_token, capacity = memory.num_heads * memory.top_k, table.fetched_capacity
    rows_per_token = min(rows_per_token, memory.num_rows)
    if capacity is not None and capacity < rows_per_token:
        raise ConfigError(
            f"table_cache: holds {capacity} rows of {name}, but one token reads {rows_per_token};"
            " increase it"
        )


class _Progress(Protocol):
    def update(self, num_bytes: int, /) -> object: ...


class _NoProgress:
    def update(self, num_bytes: int, /) -> None:
        """Show nothing."""


def progress_bar(label: str, stored: Sequence[StoredTensor]) -> AbstractContextManager[_Progress]:
    """A progress bar on stderr; none for small tables, or if stderr is not a terminal."""
    total = sum(one.num_bytes for one in stored)
    if total < _MIN_PROGRESS_BYTES:
        return nullcontext(_NoProgress())
    from tqdm import tqdm  # an option of installations that load only small tables

    bar: AbstractContextManager[_Progress] = tqdm(
        total=total, unit="B", unit_scale=True, desc=label, disable=None
    )
    return bar
