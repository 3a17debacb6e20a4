"""Value tables as they are stored: rows of a floating dtype, or records of fewer bits."""

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

_FORMAT, _VALUE_DIM = "row_format", "value_dim"
OUTPUT_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in FLOAT_DTYPES}


@dataclass(frozen=True)
class RowLayout:
    """How a table's rows are written down.

    Attributes:
        name: a floating dtype, or a row format.
        shape: of the tensor: R, and V or the bytes of a record.
        dtype: of the tensor.
        records: the row format and V, where rows are records.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    records: tuple[RowFormat, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def metadata(self) -> dict[str, str]:
        """What a file of such rows says of them."""
        if self.records is None:
            return {}
        return {_FORMAT: self.records[0], _VALUE_DIM: str(self.records[1])}

    def table(self, rows: Tensor) -> Tensor | RowRecords:
        """A tensor so laid out, as operations take it."""
        return rows if self.records is None else RowRecords(rows, *self.records)


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


def stored_layout(stored: StoredTensor) -> RowLayout:
    """How the rows of a file are (CheckpointError as ``stored_format``)."""
    records = stored_format(stored)
    if records is not None:
        return RowLayout(records[0], stored.shape, torch.uint8, records)
    dtype = DTYPES[stored.dtype]
    return RowLayout(str(dtype).removeprefix("torch."), stored.shape, dtype)


def asked_layout(stored: StoredTensor, asked: str | None) -> RowLayout:
    """How rows are when they are made ``asked``, one of ``TABLE_DTYPES``; None: as they are.

    Raises:
        CheckpointError: as ``stored_format``.
        ConfigError: ``asked`` is none of them, or what is stored has few bits already.
    """
    found = stored_layout(stored)
    if asked in (None, found.name):
        return found
    if asked not in TABLE_DTYPES:
        raise ConfigError(f"table_dtype: {asked!r} is not one of {', '.join(TABLE_DTYPES)}")
    if found.records is not None:
        raise ConfigError(f"table_dtype: {stored.file} has rows of {found.name} already")
    num_rows, value_dim = found.shape
    for row_format in ROW_FORMATS:
        if row_format == asked:
            shape = num_rows, row_bytes(row_format, value_dim)
            return RowLayout(asked, shape, torch.uint8, (row_format, value_dim))
    return RowLayout(asked, found.shape, OUTPUT_DTYPES[asked])


def converted_parts(
    stored: StoredTensor, layout: RowLayout, *, verify: bool = False
) -> Iterator[Tensor]:
    """All rows in order, some at a time, in a layout that they were ``asked_layout`` for.

    Raises:
        CheckpointError: as ``read_parts``, or a row is not finite and has to be.
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
                where = f"{stored.file}: tensor {stored.name}, from row {first} on"
                raise CheckpointError(f"{where}: {error}") from None
        first += len(part)


def read_rows(stored: StoredTensor) -> Tensor:
    """Rows of any format as a floating ``[R, V]`` tensor (CheckpointError as ``read_mapped``)."""
    records = stored_format(stored)
    rows = read_mapped(stored)
    return rows if records is None else dequantize_rows(RowRecords(rows, *records))
