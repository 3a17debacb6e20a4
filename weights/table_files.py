"""Value tables as they are stored: rows of a floating dtype, or records of fewer bits."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.config import ConfigError
from engine.model.config import ModelConfig
from memory_ops.anonymous import anonymous_zeros
from memory_ops.native.disk_rows import is_available
from memory_ops.row_formats import (
    ROW_FORMATS,
    RowFormat,
    RowRecords,
    dequantize_rows,
    quantize_rows,
    row_bytes,
)
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable, TableReadError
from weights.errors import CheckpointError
from weights.tensor_files import (
    DTYPES,
    RECORDS_DTYPE,
    StoredTensor,
    TensorSource,
    read_into,
    read_mapped,
)

_FORMAT, _VALUE_DIM = "row_format", "value_dim"
_ROWS_AT_ONCE = 2**16


def stored_format(stored: StoredTensor) -> tuple[RowFormat, int] | None:
    """The format of a table of records and its V, by its file's metadata; None for plain rows.

    Raises:
        CheckpointError: the metadata lacks them, or the table has not such records.
    """
    if stored.dtype != RECORDS_DTYPE:
        return None
    found = stored.metadata.get(_FORMAT), stored.metadata.get(_VALUE_DIM, "")
    where = f"{stored.file}: tensor {stored.name}"
    if found[0] not in ROW_FORMATS or not re.fullmatch("[0-9]{1,9}", found[1]):
        raise CheckpointError(f"{where}: its metadata names no row format and value_dim")
    row_format, value_dim = found[0], int(found[1])
    if stored.shape[1:] != (row_bytes(row_format, value_dim),):
        raise CheckpointError(
            f"{where}: has shape {list(stored.shape)}, not records of {value_dim} {row_format}"
        )
    return row_format, value_dim


def table_shape(stored: StoredTensor) -> tuple[int, ...]:
    """R and V, whatever the format (CheckpointError as ``stored_format``)."""
    records = stored_format(stored)
    return stored.shape if records is None else (stored.shape[0], records[1])


def load_table(stored: StoredTensor) -> DeviceTable:
    """All rows in memory of their own, in the format that they are stored in.

    Raises:
        CheckpointError: they cannot be read.
    """
    records = stored_format(stored)
    rows = anonymous_zeros(stored.shape, torch.uint8 if records else DTYPES[stored.dtype])
    read_into(stored, rows)
    return DeviceTable(rows if records is None else RowRecords(rows, *records))


def open_tables(
    stored: Sequence[StoredTensor], config: ModelConfig, cache_bytes: int
) -> dict[str, DiskTable]:
    """Tables that stay in their files, by name; they share the memory for rows evenly.

    Raises:
        CheckpointError: a file cannot be read so.
        ConfigError: there is no table, or not memory for the rows that a token reads.
    """
    memory = config.memory
    if memory is None:
        raise ConfigError("table_tier: disk is for value tables, and this model has none")
    if not is_available():
        raise ConfigError("table_tier: disk needs the native library, which was not built")
    tables = {}
    for one in stored:
        records = stored_format(one)
        row_format = DTYPES[one.dtype] if records is None else records[0]
        shape = one.shape[0], memory.value_dim
        try:
            table = DiskTable(one.file, one.offset, shape, row_format, cache_bytes // len(stored))
        except TableReadError as error:
            raise CheckpointError(f"tensor {one.name}: {error}") from None
        except ValueError as error:
            raise ConfigError(str(error)) from None
        least = min(memory.num_heads * memory.top_k, memory.num_rows)
        if table.num_slots < least:
            raise ConfigError(
                f"table_cache: has room for {table.num_slots} rows of {one.name}, a token reads"
                f" {least}"
            )
        tables[one.name] = table
    return tables


def read_rows(stored: StoredTensor) -> Tensor:
    """Rows of any format as a floating ``[R, V]`` tensor (CheckpointError as ``load_table``)."""
    records = stored_format(stored)
    rows = read_mapped(stored)
    return rows if records is None else dequantize_rows(RowRecords(rows, *records))


def records_source(table: TensorSource, row_format: RowFormat) -> TensorSource:
    """A floating table as records, made when it is written, some rows at a time."""
    num_rows, value_dim = table.shape
    shape = (num_rows, row_bytes(row_format, value_dim))

    def load() -> Tensor:
        rows_RV, records_RB = table.load(), torch.empty(shape, dtype=torch.uint8)
        for first in range(0, num_rows, _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            try:
                records_RB[part] = quantize_rows(rows_RV[part], row_format).records_RB
            except ValueError as error:
                raise CheckpointError(
                    f"tensor {table.name}, from row {first} on: {error}"
                ) from None
        return records_RB

    metadata: Mapping[str, str] = {_FORMAT: row_format, _VALUE_DIM: str(value_dim)}
    return TensorSource(table.name, shape, torch.uint8, load, metadata)
