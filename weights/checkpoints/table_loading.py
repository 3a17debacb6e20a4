"""Value tables made ready to be read: converted into memory, or left in their files."""

from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from engine.errors import ConfigError
from engine.model.config import MemoryConfig
from memory_ops.anonymous import anonymous_zeros
from memory_ops.native.disk_rows import is_available
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.value_table import TableReadError, ValueTable
from weights.checkpoints.table_files import RowLayout, asked_layout, converted_parts, stored_layout
from weights.checkpoints.tensor_files import StoredTensor, checksum_key, read_parts
from weights.errors import CheckpointError

# what takes no longer than a blink needs no progress bar
_SHOWN_BYTES = 256 * 2**20

Told = Callable[[int], object]


def table_layouts(stored: Sequence[StoredTensor], dtype: str) -> dict[str, RowLayout]:
    """How tables are to be, by name: ``dtype`` is one of ``TABLE_DTYPES``, or auto for as stored.

    Raises:
        CheckpointError: a file does not say how its rows are.
        ConfigError: they cannot be made so.
    """
    asked = None if dtype == "auto" else dtype
    return {one.name: asked_layout(one, asked) for one in stored}


def load_tables(
    stored: Sequence[StoredTensor], layouts: Mapping[str, RowLayout], *, verify: bool = False
) -> dict[str, ValueTable]:
    """Tables in memory of their own, by name; beside them there is room for a few rows alone.

    Args:
        stored: the tables.
        layouts: how they are to be.
        verify: whether their data are compared with the checksums in their files.

    Raises:
        CheckpointError: they cannot be read, are not what they were, or a row cannot be converted.
        ConfigError: the system has no such memory.
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
    """Tables that stay in their files, by name; they share the memory for rows evenly.

    Args:
        stored: the tables.
        layouts: how they are to be, which is how they are.
        memory: the shapes of their layers.
        cache_bytes: memory for rows.
        verify: whether all data are read once and compared with the checksums in their files.

    Raises:
        CheckpointError: a file cannot be read so, or is not what it was.
        ConfigError: rows would have to be converted, or there is not memory for the rows that a
            token reads.
    """
    if not is_available():
        raise ConfigError("table_tier: disk needs the native library, which was not built")
    for one in stored:
        found, wanted = stored_layout(one).name, layouts[one.name].name
        if found != wanted:
            raise ConfigError(
                f"table_dtype: rows on disk stay {found}; for {wanted} make another folder:"
                f" memplus quantize {one.file.parent} DST --table-dtype {wanted}"
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


def _load(stored: StoredTensor, layout: RowLayout, verify: bool, told: Told) -> DeviceTable:
    try:
        rows = anonymous_zeros(layout.shape, layout.dtype)
    except OSError as error:
        raise ConfigError(
            f"table_tier: device has no {layout.num_bytes} bytes for {stored.name}:"
            f" {error.strerror}"
        ) from None
    if layout == stored_layout(stored):
        for part in read_parts(stored, rows, verify=verify):
            told(part.nbytes)
    else:
        first, row_bytes = 0, stored.num_bytes // stored.shape[0]
        for part in converted_parts(stored, layout, verify=verify):
            rows[first : first + len(part)] = part
            first += len(part)
            told(row_bytes * len(part))
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
    least = min(memory.num_heads * memory.top_k, memory.num_rows)
    if table.num_slots < least:
        raise ConfigError(
            f"table_cache: has room for {table.num_slots} rows of {stored.name}, a token reads"
            f" {least}"
        )
    return table


def _progress(what: str, stored: Sequence[StoredTensor]) -> "tqdm[None]":
    """A bar on stderr, where that is a terminal and there is something to wait for."""
    total = sum(one.num_bytes for one in stored)
    hidden = True if total < _SHOWN_BYTES else None
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=hidden)
