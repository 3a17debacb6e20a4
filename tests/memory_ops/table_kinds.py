"""Test tables of every kind, small and larger than 2**31 elements, and a tolerance for sums."""

import torch
from torch import Tensor

from memory_ops.anonymous import anonymous_zeros
from memory_ops.checks import Table
from memory_ops.row_formats import (
    ROW_FORMATS,
    RowRecords,
    dequantize_rows,
    quantize_rows,
    scale_bytes,
    scale_offset,
)
from tests.conftest import TOLERANCE

PLAIN = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = (*PLAIN, *ROW_FORMATS)


def table_of(kind: str, values_RV: Tensor) -> Table:
    """A table of that kind with these values."""
    if kind in PLAIN:
        return values_RV.to(PLAIN[kind])
    return quantize_rows(values_RV, kind)


def exact_values(table: Table) -> Tensor:
    """A table's values as fp64, as input for the reference."""
    values_RV = dequantize_rows(table) if isinstance(table, RowRecords) else table
    return values_RV.double()


def rows_of(table: Table, *shape: int) -> Tensor:
    """Random row ids that include the last row: reading past its end leaves the table."""
    rows = torch.randint(0, num_rows(table), shape)
    rows[-1, -1, -1] = num_rows(table) - 1
    return rows


def with_padding_filled(table: RowRecords) -> RowRecords:
    """The same records with nonzero bytes in their padding."""
    records_RB = table.records_RB.clone()
    start = scale_offset(table.row_format, table.value_dim)
    if table.row_format in ("int8", "fp8"):
        records_RB[:, table.value_dim : start] = 0x5A
    records_RB[:, start + scale_bytes(table.row_format, table.value_dim) :] = 0x5A
    return RowRecords(records_RB, table.row_format, table.value_dim)


def with_gaps(table: Table) -> Table:
    """The same table with NaN (plain kinds) or bytes of 0x5A (records) between its rows."""
    part_RC = table.records_RB if isinstance(table, RowRecords) else table
    filler = 0x5A if isinstance(table, RowRecords) else torch.nan
    wide_RC = torch.full((len(part_RC), part_RC.shape[1] + 128), filler).to(part_RC.dtype)
    apart_RC = wide_RC[:, 64:-64].copy_(part_RC)
    if isinstance(table, RowRecords):
        return RowRecords(apart_RC, table.row_format, table.value_dim)
    return apart_RC


def vast_table(kind: str, last_RV: Tensor) -> Table:
    """A table of more than 2**31 elements: zeros that use no memory, then ``last_RV``.

    Elements are the units of a kernel's offsets: for both int4 kinds, words of 32 bits.
    """
    last = table_of(kind, last_RV)
    part_RC = last.records_RB if isinstance(last, RowRecords) else last
    step = part_RC.shape[1] // 4 if kind in ("int4", "int4_row") else part_RC.shape[1]
    whole_RC = anonymous_zeros((2**31 // step + len(part_RC), part_RC.shape[1]), part_RC.dtype)
    whole_RC[-len(part_RC) :] = part_RC
    if isinstance(last, RowRecords):
        return RowRecords(whole_RC, last.row_format, last.value_dim)
    return whole_RC


def num_rows(table: Table) -> int:
    """The number of rows."""
    return len(table.records_RB if isinstance(table, RowRecords) else table)


def vast_rows(rows_TV: Tensor) -> Tensor:
    """The same matrix with its last row more than 2**31 elements after its first.

    With three or more rows, the stride fits in 32 bits, as kernels require.
    """
    step, width = 2**31 // (len(rows_TV) - 1) + 64, rows_TV.shape[1]
    memory = anonymous_zeros(((len(rows_TV) - 1) * step + width,), rows_TV.dtype)
    apart_TV = memory.as_strided(rows_TV.shape, (step, 1))
    apart_TV.copy_(rows_TV)
    return apart_TV


def check_close(out: Tensor, exact: Tensor, num_terms: int) -> None:
    """Assert that fp32 sums of ``num_terms`` terms agree with the exact sums."""
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(out, exact.float(), rtol=rtol, atol=atol * num_terms**0.5)
