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
def row_values(
    values_ptr,
    scales_ptr,
    rows,
    places,
    mask,
    ROW_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    KIND: tl.constexpr,
):
    """Some rows' values as fp32, ``[rows, columns]``, but for ``times_row_scale``; masked off, 0.

    Args:
        rows: int64, so that offsets are too.
        places: elements of ``values`` in each row; what they hold is ``columns_of`` them.
    """
    offsets = rows[:, None] * ROW_STRIDE + places[None, :]
    codes = tl.load(values_ptr + offsets, mask=mask, other=0)
    if KIND == "int4":
        offsets = rows[:, None] * SCALE_STRIDE + SCALE_START + places[None, :] // 16
        values = _int4_values(codes, tl.load(scales_ptr + offsets, mask=mask, other=0))
    elif KIND == "fp8":
        values = _fp8_values(codes)
    else:
        values = codes.to(tl.float32)
    return values


@triton.jit
def columns_of(start, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """The columns of a table that ``BLOCK`` elements of ``values`` hold, in the order unpacked.

    int4 counts words first, planes last:  column = 128 * (word // 16) + 16 * plane + word % 16
    """
    if KIND == "int4":
        position = tl.arange(0, 8 * BLOCK)
        word = start + position // 8
        columns = word // 16 * 128 + position % 8 * 16 + word % 16
    else:
        columns = start + tl.arange(0, BLOCK)
    return columns


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
def _fp8_values(codes):
    """2**-8 times the values of e4m3 codes, for FP8_FACTOR to make good.

    Decoded by their bits, since sm_80 has no instruction for it: sign, exponent and fraction move
    to their places in an fp16, whose conversion to fp32 is exact, subnormal values included.
    e4m3's NaN, which no table holds, reads as 480.
    """
    # widening copies the sign into bit 14 too
    bits = (codes.to(tl.int16) << 7) & -0x4001
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _int4_values(words, scales):
    """value = (4 bits of a word - 8) * the bf16 scale of its group, in the order of columns_of.

    ``words`` int32 and ``scales`` int64, the four scales of each word's block, are
    ``[rows, words]``, the values ``[rows, 8 * words]``.
    """
    p0, p1 = _int4_planes(words, scales, 0)
    p2, p3 = _int4_planes(words, scales, 1)
    p4, p5 = _int4_planes(words, scales, 2)
    p6, p7 = _int4_planes(words, scales, 3)
    # a join adds the fastest dimension and stays within a lane's registers
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    return tl.reshape(tl.join(even, odd), [words.shape[0], words.shape[1] * 8])


@triton.jit
def _int4_planes(words, scales, GROUP: tl.constexpr):
    """The two planes of 16 values that share the scale ``GROUP`` of a block."""
    bits = ((scales >> (16 * GROUP)) & 0xFFFF).to(tl.int32) << 16
    scale = bits.to(tl.float32, bitcast=True)
    low = ((words >> (8 * GROUP)) & 15) - 8
    high = ((words >> (8 * GROUP + 4)) & 15) - 8
    return low.to(tl.float32) * scale, high.to(tl.float32) * scale
