"""View of a value table for Triton kernels: typed pointers, strides, and conversion to fp32."""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import Table, table_shape
from memory_ops.row_formats import RowRecords, scale_offset

ValueKind = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4", "int4_row"]

KINDS: dict[torch.dtype, ValueKind] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
# kernels read four int4 scales at once: one 64-bit word per block of 128 values; and the scale of
# int4_row with the two bytes of padding after it
_CODES = {
    "int8": torch.int8,
    "fp8": torch.int8,
    "int4": torch.int32,
    "int4_row": torch.int32,
}
_SCALES = {
    "int8": torch.float32,
    "fp8": torch.float32,
    "int4": torch.int64,
    "int4_row": torch.int32,
}

# e4m3 bits decoded as fp16 are too small by 2**8, because the exponent biases are 7 and 15
FP8_FACTOR = tl.constexpr(256.0)


@dataclass(frozen=True)
class TableView:
    """A table's memory as values and, for records, also as scales.

    Attributes:
        kind: format of the values; it selects kernels and launches.
        values: ``[R, ...]``: the values, int8 codes, or int32 words of eight int4 values.
        scales: None, or the same memory as fp32 scales, as int64 words of four bf16 scales, or as
            int32 words whose low half is an fp16 scale.
        value_dim: V.
        width: elements of ``values`` that kernels read per row: V, rounded up to whole 128-bit
            loads for records; for both int4 kinds, the words of all blocks.
        row_stride: row stride in elements of ``values``.
        scale_stride: row stride in elements of ``scales``.
        scale_start: offset of a row's first scale in elements of ``scales``.
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
        """Compile-time constants of the kernels.

        With a run-time width of 1000 the compiler cannot know that it is a multiple of 8, and would
        load 16 bits at a time.
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
    """The view of a table on any device, without a copy.

    Raises:
        ValueError: the dtype is not supported, or the values of a row are not contiguous.
    """
    if isinstance(table, RowRecords):
        return _records_view(table)
    value_dim = table_shape(table)[1]
    if value_dim > 1 and table.stride(1) != 1:
        raise ValueError(
            f"table: expected contiguous values in a row, got strides {table.stride()}"
        )
    kind = value_kind("table", table)
    return TableView(kind, table, None, value_dim, value_dim, row_stride=table.stride(0))


def value_kind(name: str, values: Tensor) -> ValueKind:
    """The kind of floating-point values.

    Raises:
        ValueError: the dtype is not supported; the message begins with ``name``.
    """
    kind = KINDS.get(values.dtype)
    if kind is None:
        wanted = ", ".join(str(dtype) for dtype in KINDS)
        raise ValueError(f"{name}: the Triton kernels support {wanted}, not {values.dtype}")
    return kind


def has_int4_words(kind: ValueKind) -> bool:
    """Whether values are words of eight int4 values, which other kernels read."""
    return kind in ("int4", "int4_row")


def _records_view(table: RowRecords) -> TableView:
    records_RB, kind = table.records_RB, table.row_format
    stride, offset = records_RB.stride(0), records_RB.storage_offset()
    # check the address too, because storage itself may be unaligned
    places = (stride, offset, records_RB.data_ptr())
    if records_RB.stride(1) != 1 or any(place % 64 for place in places):
        found = f"strides {records_RB.stride()}, offset {offset}, address {places[2]:#x}"
        raise ValueError(f"records: expected contiguous records aligned to 64 bytes, got {found}")
    values, scales = records_RB.view(_CODES[kind]), records_RB.view(_SCALES[kind])
    codes_end = scale_offset(kind, table.value_dim)
    return TableView(
        kind,
        values,
        scales,
        table.value_dim,
        width=codes_end // 4 if has_int4_words(kind) else -(-table.value_dim // 16) * 16,
        row_stride=values.stride(0),
        scale_stride=scales.stride(0),
        scale_start=codes_end // scales.element_size(),
    )


@triton.jit
def row_values(values_ptr, rows, columns, mask, ROW_STRIDE: tl.constexpr, KIND: tl.constexpr):
    """Values of some rows as fp32, ``[rows, columns]``, 0 where masked. Not for words of int4.

    Args:
        rows: int64 row ids, so that offsets are int64 too.
    """
    codes = tl.load(values_ptr + rows[:, None] * ROW_STRIDE + columns[None, :], mask=mask, other=0)
    if KIND == "fp8":
        values = fp8_values(codes)
    elif KIND == "int8":
        values = small_int_to_fp32(codes.to(tl.int32))
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
    """One factor per row, multiplied by the row's scale if the kind has one per row.

    So kernels apply the scale once per row instead of once per value.
    """
    if KIND == "int8" or KIND == "fp8" or KIND == "int4_row":
        scales = tl.load(scales_ptr + rows * SCALE_STRIDE + SCALE_START, mask=live, other=0)
        if KIND == "int4_row":
            scales = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        factors *= scales
    if KIND == "fp8":
        factors *= FP8_FACTOR
    return factors


@triton.jit
def small_int_to_fp32(codes):
    """Small int32 as fp32, exact: adds to the bits of 1.5 * 2**23, faster than a conversion."""
    return (codes + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def fp8_values(codes):
    """The values of e4m3 codes times 2**-8; ``FP8_FACTOR`` compensates.

    sm_80 has no instruction for e4m3, so this moves sign, exponent and fraction to their places in
    an fp16. The conversion to fp32 is exact, also for subnormal values. e4m3's NaN, which no table
    contains, decodes as 480.
    """
    # sign extension also sets bit 14, which the mask clears
    bits = (codes.to(tl.int16) << 7) & -0x4001
    return bits.to(tl.float16, bitcast=True).to(tl.float32)
