"""A value table as kernels see it: typed pointers, strides, and how its bytes become fp32."""

# triton and with it its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import Table, table_shape
from memory_ops.row_formats import RowRecords, scale_offset

ValueKind = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]

KINDS: dict[torch.dtype, ValueKind] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
# an int4 record's scales are read four at once, one 64-bit word a block of 128 values
_CODES = {"int8": torch.int8, "fp8": torch.int8, "int4": torch.int32}
_SCALES = {"int8": torch.float32, "fp8": torch.float32, "int4": torch.int64}

# e4m3 bits read as fp16 are too small by 2**8: the exponents' biases are 7 and 15
FP8_FACTOR = tl.constexpr(256.0)


@dataclass(frozen=True)
class TableView:
    """A table's memory, seen twice where rows have scales.

    Attributes:
        kind: what the values are, by which kernels and launches are chosen.
        values: ``[R, ...]``: the values themselves, int8 codes, or int32 words of eight values.
        scales: None, or the same memory as fp32, or as int64 words of four bf16 scales.
        value_dim: V.
        width: elements of ``values`` to read of a row: V, where a record allows rounded up to whole
            loads of 128 bits; of int4, the words of all blocks.
        row_stride: elements of ``values`` from row to row.
        scale_stride: elements of ``scales`` from row to row.
        scale_start: elements of ``scales`` in a row before its first scale.
    """

    kind: ValueKind
    values: Tensor
    scales: Tensor | None
    value_dim: int
    width: int
    row_stride: int
    scale_stride: int = 0
    scale_start: int = 0

    def constants(self) -> dict[str, int | str]:
        """What kernels are compiled for.

        Of a run-time width of 1000 the compiler does not know that it is a multiple of 8, and loads
        16 bits at a time.
        """
        return {
            "KIND": self.kind,
            "VALUE_DIM": self.value_dim,
            "WIDTH": self.width,
            "ROW_STRIDE": self.row_stride,
            "SCALE_STRIDE": self.scale_stride,
            "SCALE_START": self.scale_start,
        }


def table_view(table: Table) -> TableView:
    """What the kernels need to know of a table, whatever its device; nothing is copied.

    Raises:
        ValueError: values of another dtype, or rows whose values do not lie next to each other.
    """
    if isinstance(table, RowRecords):
        return _records_view(table)
    value_dim = table_shape(table)[1]
    if value_dim > 1 and table.stride(1) != 1:
        strides = f"strides {table.stride()}"
        raise ValueError(f"table: expected the values of a row next to each other, got {strides}")
    kind = value_kind("table", table)
    return TableView(kind, table, None, value_dim, value_dim, row_stride=table.stride(0))


def value_kind(name: str, values: Tensor) -> ValueKind:
    """The kind of plain values.

    Raises:
        ValueError: they are of another dtype; ``name`` is what the message calls them.
    """
    kind = KINDS.get(values.dtype)
    if kind is None:
        wanted = ", ".join(str(dtype) for dtype in KINDS)
        raise ValueError(f"{name}: the Triton kernels read {wanted}, not {values.dtype}")
    return kind


def _records_view(table: RowRecords) -> TableView:
    records_RB, kind = table.records_RB, table.row_format
    stride, offset = records_RB.stride(0), records_RB.storage_offset()
    # an address may be odd although the offset is even: storage can begin anywhere
    places = (stride, offset, records_RB.data_ptr())
    if records_RB.stride(1) != 1 or any(place % 64 for place in places):
        found = f"strides {records_RB.stride()}, offset {offset}, address {places[2]:#x}"
        raise ValueError(f"records: expected whole records at multiples of 64 bytes, got {found}")
    values, scales = records_RB.view(_CODES[kind]), records_RB.view(_SCALES[kind])
    codes_end = scale_offset(kind, table.value_dim)
    return TableView(
        kind,
        values,
        scales,
        table.value_dim,
        width=codes_end // 4 if kind == "int4" else -(-table.value_dim // 16) * 16,
        row_stride=values.stride(0),
        scale_stride=scales.stride(0),
        scale_start=codes_end // scales.element_size(),
    )


@triton.jit
def row_values(values_ptr, rows, columns, mask, ROW_STRIDE: tl.constexpr, KIND: tl.constexpr):
    """Some rows' values as fp32, ``[rows, columns]``; masked off, 0. Not of int4.

    Args:
        rows: int64, so that offsets are too.
    """
    codes = tl.load(values_ptr + rows[:, None] * ROW_STRIDE + columns[None, :], mask=mask, other=0)
    if KIND == "fp8":
        values = _fp8_values(codes)
    elif KIND == "int8":
        values = small_float(codes.to(tl.int32))
    else:
        values = codes.to(tl.float32)
    return values


@triton.jit
def times_row_scale(
    factors,
    scales_ptr,
    rows,
    live,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    KIND: tl.constexpr,
):
    """One factor a row, times the fp32 that ends an int8 or fp8 record; of other kinds, as it is.

    So a row's values are multiplied by its scale all at once.
    """
    if KIND == "int8" or KIND == "fp8":
        factors *= tl.load(scales_ptr + rows * SCALE_STRIDE + SCALE_START, mask=live, other=0.0)
    if KIND == "fp8":
        factors *= FP8_FACTOR
    return factors


@triton.jit
def small_float(codes):
    """Small int32 as fp32, exactly, as the low bits of 1.5 * 2**23: faster than to convert."""
    return (codes + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _fp8_values(codes):
    """2**-8 times the values of e4m3 codes, for FP8_FACTOR to make good.

    Decoded by their bits, since sm_80 has no instruction for it: sign, exponent and fraction move
    to their places in an fp16, whose conversion to fp32 is exact, subnormal values included.
    e4m3's NaN, which no table holds, reads as 480.
    """
    # widening copies the sign into bit 14 too
    bits = (codes.to(tl.int16) << 7) & -0x4001
    return bits.to(tl.float16, bitcast=True).to(tl.float32)
