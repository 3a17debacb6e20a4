"""Formats of stored value tables: rows of a floating dtype, or quantised records."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError
from memory_ops.row_formats import (
    ROW_FORMATS,
    RowFormat,
    RowRecords,
    dequantize_rows,
    quantize_rows,
    row_bytes,
)
from weights.checkpoints.dtype_names import FLOAT_DTYPES, TABLE_DTYPES
from weights.checkpoints.tensor_files import (
    DTYPES,
    RECORDS_DTYPE,
    StoredTensor,
    read_mapped,
    read_parts,
)
from weights.errors import CheckpointError

# a record of the rows that texts read, which a model folder may have
ROW_READS_FILE = "row_reads.safetensors"
_FORMAT, _VALUE_DIM = "row_format", "value_dim"
OUTPUT_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in FLOAT_DTYPES}


@dataclass(frozen=True)
class RowLayout:
    """Format of a table's rows.

    Attributes:
        name: a floating dtype or a row format.
        shape: shape of the tensor: [R, V], or [R, bytes of a record].
        dtype: dtype of the tensor.
        records: the row format and V if rows are records, else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    records: tuple[RowFormat, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def metadata(self) -> dict[str, str]:
        """File metadata that describe the rows; empty for a floating dtype."""
        if self.records is None:
            return {}
        return {_FORMAT: self.records[0], _VALUE_DIM: str(self.records[1])}

    def table(self, rows: Tensor) -> Tensor | RowRecords:
        """``rows``, a tensor in this layout, as the argument of memory operations."""
        return rows if self.records is None else RowRecords(rows, *self.records)


def stored_format(stored: StoredTensor) -> tuple[RowFormat, int] | None:
    """Row format and V of a table of records, from its file's metadata; None for floating rows.

    Raises:
        CheckpointError: the metadata lack them, or do not match the table's shape.
    """
    if stored.dtype != RECORDS_DTYPE:
        return None
    found = stored.metadata.get(_FORMAT), stored.metadata.get(_VALUE_DIM, "")
    where = f"{stored.file}: tensor {stored.name}"
    if found[0] not in ROW_FORMATS or not re.fullmatch("[0-9]{1,9}", found[1]):
        raise CheckpointError(f"{where}: has no valid {_FORMAT} and {_VALUE_DIM} in its metadata")
    row_format, value_dim = found[0], int(found[1])
    if stored.shape[1:] != (row_bytes(row_format, value_dim),):
        raise CheckpointError(
            f"{where}: shape {list(stored.shape)} does not fit records of {value_dim} {row_format}"
            " values"
        )
    return row_format, value_dim


def table_shape(stored: StoredTensor) -> tuple[int, ...]:
    """R and V of a table in any format (CheckpointError as ``stored_format``)."""
    records = stored_format(stored)
    return stored.shape if records is None else (stored.shape[0], records[1])


def stored_layout(stored: StoredTensor) -> RowLayout:
    """Layout of the rows in a file (CheckpointError as ``stored_format``)."""
    records = stored_format(stored)
    if records is not None:
        return RowLayout(records[0], stored.shape, torch.uint8, records)
    dtype = DTYPES[stored.dtype]
    return RowLayout(str(dtype).removeprefix("torch."), stored.shape, dtype)


def requested_layout(stored: StoredTensor, dtype: str | None) -> RowLayout:
    """Layout of rows converted to ``dtype``, one of ``TABLE_DTYPES``; None keeps the stored layout.

    Raises:
        CheckpointError: as ``stored_format``.
        ConfigError: ``dtype`` is unknown, or the stored rows are quantised already.
    """
    found = stored_layout(stored)
    if dtype in (None, found.name):
        return found
    if dtype not in TABLE_DTYPES:
        raise ConfigError(f"table_dtype: {dtype!r} is not one of {', '.join(TABLE_DTYPES)}")
    if found.records is not None:
        raise ConfigError(f"table_dtype: {stored.file} has {found.name} rows already")
    return row_layout(dtype, *found.shape)


def row_layout(dtype: str, num_rows: int, value_dim: int) -> RowLayout:
    """Layout of R rows of V values in ``dtype``, one of ``TABLE_DTYPES``."""
    for row_format in ROW_FORMATS:
        if row_format == dtype:
            shape = num_rows, row_bytes(row_format, value_dim)
            return RowLayout(dtype, shape, torch.uint8, (row_format, value_dim))
    return RowLayout(dtype, (num_rows, value_dim), OUTPUT_DTYPES[dtype])


def converted_parts(
    stored: StoredTensor, layout: RowLayout, *, verify: bool = False
) -> Iterator[Tensor]:
    """All rows in order, in parts, converted to a layout from ``requested_layout``.

    Raises:
        CheckpointError: as ``read_parts``, or a row to quantise is not finite.
    """
    as_stored, first = stored_layout(stored), 0
    for part in read_parts(stored, verify=verify):
        if layout == as_stored:
            yield part
        elif layout.records is None:
            yield part.to(layout.dtype)
        else:
            try:
                yield quantize_rows(part, layout.records[0]).records_RB
            except ValueError as error:
                where = f"{stored.file}: tensor {stored.name}, rows from {first}"
                raise CheckpointError(f"{where}: {error}") from None
        first += len(part)


def float_rows(stored: StoredTensor, rows: Tensor) -> Tensor:
    """Some rows of a table as they are stored, as floating values (CheckpointError)."""
    records = stored_format(stored)
    return rows if records is None else dequantize_rows(RowRecords(rows, *records))


def read_rows(stored: StoredTensor) -> Tensor:
    """All rows in any format as a floating ``[R, V]`` tensor (CheckpointError)."""
    return float_rows(stored, read_mapped(stored))
