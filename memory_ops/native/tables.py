"""Describes value tables to the native kernels."""

import ctypes

import torch

from memory_ops.checks import Table
from memory_ops.row_formats import RowRecords, scale_offset

# the codes of row_table.h
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = {"int8": 3, "fp8": 4, "int4": 5, "int4_row": 6}


class NativeTable(ctypes.Structure):
    """``memplus::Table`` of row_table.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("num_rows", "row_stride", "value_dim", "scale_offset")
        ),
        ("format", ctypes.c_int32),
    )


def table_arguments(table: Table) -> tuple[int, int, int, int, int, int]:
    """C arguments: data, num_rows, row_stride in bytes, value_dim, scale_offset, format."""
    if isinstance(table, RowRecords):
        records_RB = table.records_RB
        num_rows, offset = records_RB.shape[0], scale_offset(table.row_format, table.value_dim)
        code = FORMATS[table.row_format]
        return records_RB.data_ptr(), num_rows, records_RB.stride(0), table.value_dim, offset, code
    assert table.stride()[1] == 1
    num_rows, value_dim = table.shape
    stride = table.stride()[0] * table.itemsize
    return table.data_ptr(), num_rows, stride, value_dim, 0, _DTYPES[table.dtype]
