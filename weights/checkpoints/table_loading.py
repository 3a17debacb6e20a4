"""Opens value tables for serving: loads and converts them into memory, or opens their files."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from engine.errors import ConfigError
from engine.model.config import MemoryConfig
from memory_ops.anonymous import anonymous_zeros
from memory_ops.native.disk_rows import is_available
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.value_table import TableReadError, ValueTable
from weights.checkpoints.table_files import (
    RowLayout,
    converted_parts,
    requested_layout,
    stored_layout,
)
from weights.checkpoints.tensor_files import StoredTensor, checksum_key, read_parts
from weights.errors import CheckpointError

# tables smaller than this load too fast for a progress bar
_MIN_PROGRESS_BYTES = 256 * 2**20

OnBytes = Callable[[int], object]


def table_layouts(stored: Sequence[StoredTensor], dtype: str) -> dict[str, RowLayout]:
    """Layouts to serve tables in, by name, for a ``dtype`` of ``TABLE_DTYPES`` or auto (as stored).

    Raises:
        CheckpointError: a file does not describe its rows.
        ConfigError: the rows cannot be converted to ``dtype``.
    """
    chosen = None if dtype == "auto" else dtype
    return {one.name: requested_layout(one, chosen) for one in stored}


def load_tables(
    stored: Sequence[StoredTensor], layouts: Mapping[str, RowLayout], *, verify: bool = False
) -> dict[str, ValueTable]:
    """Tables in memory, by name; loading needs little memory beyond the tables.

    Args:
        stored: the tables.
        layouts: layouts to convert them to, by name.
        verify: compare their data with the checksums in their files.

    Raises:
        CheckpointError: a table cannot be read, fails its checksum, or a row cannot be converted.
        ConfigError: the system has not enough memory.
    """
    with _progress("tables", stored) as progress:
        return {one.name: _load(one, layouts[one.name], verify, progress.update) for one in stored}


def open_tables(
    stored: Sequence[StoredTensor],
    layouts: Mapping[str, RowLayout],
    memory: MemoryConfig,
    cache_bytes: int,
    *,
    verify: bool = False,
) -> dict[str, ValueTable]:
    """Tables of the disk tier, by name; they share the row cache evenly.

    Args:
        stored: the tables.
        layouts: layouts by name; must be the stored ones.
        memory: shapes of the memory layers.
        cache_bytes: bytes of row cache for all tables.
        verify: read all data once and compare them with the checksums in their files.

    Raises:
        CheckpointError: a file cannot be read by the disk tier, or fails its checksum.
        ConfigError: rows would have to be converted, or the cache cannot hold the rows that one
            token reads.
    """
    if not is_available():
        raise ConfigError("table_tier: disk needs the native library, which is not built")
    for one in stored:
        found, wanted = stored_layout(one).name, layouts[one.name].name
        if found != wanted:
            raise ConfigError(
                f"table_dtype: the disk tier cannot convert {found} rows to {wanted}; run"
                f" `memplus quantize {one.file.parent} DST --table-dtype {wanted}`"
            )
    share = cache_bytes // len(stored)
    tables: dict[str, ValueTable] = {
        one.name: _open(one, layouts[one.name], memory, share) for one in stored
    }
    if verify:
        with _progress("checksums", stored) as progress:
            for one in stored:
                for part in read_parts(one, verify=True):
                    progress.update(part.nbytes)
    return tables


def _load(stored: StoredTensor, layout: RowLayout, verify: bool, on_bytes: OnBytes) -> DeviceTable:
    try:
        rows = anonymous_zeros(layout.shape, layout.dtype)
    except OSError as error:
        raise ConfigError(
            f"table_tier: device cannot allocate {layout.num_bytes} bytes for {stored.name}:"
            f" {error.strerror}"
        ) from None
    if layout == stored_layout(stored):
        for part in read_parts(stored, rows, verify=verify):
            on_bytes(part.nbytes)
    else:
        first, row_bytes = 0, stored.num_bytes // stored.shape[0]
        for part in converted_parts(stored, layout, verify=verify):
            rows[first : first + len(part)] = part
            first += len(part)
            on_bytes(row_bytes * len(part))
    return DeviceTable(layout.table(rows))


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
    rows_per_token = min(memory.num_heads * memory.top_k, memory.num_rows)
    if table.num_slots < rows_per_token:
        raise ConfigError(
            f"table_cache: holds {table.num_slots} rows of {stored.name}, but one token reads"
            f" {rows_per_token}; increase it"
        )
    return table


class _Progress(Protocol):
    def update(self, num_bytes: int, /) -> object: ...


class _NoProgress:
    def update(self, num_bytes: int, /) -> None:
        """Show nothing."""


def _progress(label: str, stored: Sequence[StoredTensor]) -> AbstractContextManager[_Progress]:
    """A progress bar on stderr; none for small tables, or if stderr is not a terminal."""
    total = sum(one.num_bytes for one in stored)
    if total < _MIN_PROGRESS_BYTES:
        return nullcontext(_NoProgress())
    from tqdm import tqdm  # an option of installations that load only small tables

    bar: AbstractContextManager[_Progress] = tqdm(
        total=total, unit="B", unit_scale=True, desc=label, disable=None
    )
    return bar
