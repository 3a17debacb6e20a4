"""Quantized row formats (int8, fp8, int4, int4_row): records of a row's values and scales.

A record is ``row_bytes`` bytes, a multiple of 64, so that one read fetches a whole row:

    int8   V signed bytes, then (at a multiple of 4) one fp32 scale
    fp8    V bytes of e4m3 (the finite kind, without NaN), then one fp32 scale
    int4   blocks of 128 values in 64 bytes, then one bf16 scale for each 32 values
    int4_row   the blocks of int4, then one fp16 scale

In an int4 block the lowest 4 bits of its sixteen little-endian 32-bit words are values 0 to 15, the
next 4 bits values 16 to 31, and so on, each plus 8; zeros pad the last block. With this layout, one
shift and one mask put sixteen values into sixteen lanes. Unused bytes are zero.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

RowFormat = Literal["int8", "int4", "int4_row", "fp8"]
ROW_FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)

INT4_BLOCK = 128
INT4_GROUP = 32
_INT4_SCALES = {"int4": torch.bfloat16, "int4_row": torch.float16}
_FP8_LARGEST = 448.0
# the least magnitude whose scale would be rounded to infinity
_INT4_ROW_LIMIT = 8 * 65_520.0


def row_bytes(row_format: RowFormat, value_dim: int) -> int:
    """Bytes of a record of ``value_dim`` values."""
    used = scale_offset(row_format, value_dim) + scale_bytes(row_format, value_dim)
    return -(-used // 64) * 64


def scale_offset(row_format: RowFormat, value_dim: int) -> int:
    """Bytes of a record before its scales."""
    if row_format in _INT4_SCALES:
        return _padded_to_blocks(value_dim) // 2
    return -(-value_dim // 4) * 4


def scale_bytes(row_format: RowFormat, value_dim: int) -> int:
    """Bytes of a record's scales."""
    if row_format == "int4":
        return 2 * (_padded_to_blocks(value_dim) // INT4_GROUP)
    return 2 if row_format == "int4_row" else 4


@dataclass(frozen=True, eq=False)
class RowRecords:
    """A value table of R records.

    Attributes:
        records_RB: uint8 ``[R, row_bytes]``.
        row_format: the format of the records.
        value_dim: V, the number of values in a row.

    Raises:
        ValueError: the tensor has another dtype or shape.
    """

    records_RB: Tensor
    row_format: RowFormat
    value_dim: int

    def __post_init__(self) -> None:
        if self.row_format not in ROW_FORMATS:
            known = ", ".join(ROW_FORMATS)
            raise ValueError(f"row_format: {self.row_format!r} is not one of {known}")
        if self.value_dim < 1:
            raise ValueError(f"value_dim: must be at least 1, not {self.value_dim}")
        shape, dtype = tuple(self.records_RB.shape), self.records_RB.dtype
        wanted = row_bytes(self.row_format, self.value_dim)
        if dtype != torch.uint8 or len(shape) != 2 or shape[1] != wanted:
            expected = f"uint8 [R, {wanted}] for {self.value_dim} {self.row_format} values"
            raise ValueError(f"records: expected {expected}, got {dtype} {shape}")


class RowRangeError(ValueError):
    """A row has values that its format cannot hold: the message gives the row."""

    def __init__(self, row: int, row_format: RowFormat) -> None:
        limit = f", or of {_INT4_ROW_LIMIT:g} and more" if row_format == "int4_row" else ""
        super().__init__(f"values: row {row} has values that are not finite{limit}")


def quantize_rows(values_RV: Tensor, row_format: RowFormat) -> RowRecords:
    """Quantize rows to ``row_format``.

    int8 and fp8 scale each row so that its largest magnitude is the format's largest number. int4
    scales each group of 32 values, and int4_row each row, so that the value of largest magnitude
    becomes -8. A row of int4_row with no value of 5e-4 or more loses precision: its scale is
    subnormal in fp16.

    Plain torch; ``operations.quantize_rows`` chooses a faster backend with bit-identical results.

    Args:
        values_RV: ``[R, V]``, floating.
        row_format: one of ``ROW_FORMATS``.

    Raises:
        ValueError: the values are not a floating-point matrix, or one of them is not finite, or
            too large for int4_row (524,160 or more).
    """
    if values_RV.dim() != 2 or not values_RV.is_floating_point():
        found = f"{values_RV.dtype} {tuple(values_RV.shape)}"
        raise ValueError(f"values: expected a floating-point [R, V] tensor, got {found}")
    records = _zero_records(values_RV, row_format, values_RV.shape[1])
    values_RV = values_RV.float()
    limit = _INT4_ROW_LIMIT if row_format == "int4_row" else torch.inf
    is_held_RV = values_RV.abs() < limit
    if not is_held_RV.all():
        raise RowRangeError(int((~is_held_RV).any(dim=1).nonzero()[0]), row_format)
    if len(values_RV):
        round_rows = _round_int4 if row_format in _INT4_SCALES else _round_bytes
        _fill(records, *round_rows(values_RV, row_format))
    return records


def int4_row_records(codes_RV: Tensor, scale_R: Tensor) -> RowRecords:
    """Records of int4_row whose values are ``(codes - 8) * scale`` exactly.

    Args:
        codes_RV: uint8 ``[R, V]``, from 0 to 15.
        scale_R: fp16 ``[R]``, finite.
    """
    records = _zero_records(codes_RV, "int4_row", codes_RV.shape[1])
    _fill(records, _packed_int4(codes_RV), scale_R[:, None])
    return records


def dequantize_rows(records: RowRecords, rows: Tensor | None = None) -> Tensor:
    """The values of all rows, or of int64 ``rows`` ``[L]``, as fp32 ``[L, V]``.

    Raises:
        IndexError: a row id lies outside the table.
    """
    records_LB = records.records_RB
    if rows is not None:
        # unlike indexing, an embedding refuses negative row ids
        records_LB = torch.nn.functional.embedding(rows, records_LB)
    value_dim, start = records.value_dim, scale_offset(records.row_format, records.value_dim)
    if records.row_format in _INT4_SCALES:
        return _unpack_int4(records_LB, value_dim, records.row_format)
    codes_LV = records_LB[:, :value_dim]
    scale_L1 = records_LB[:, start : start + 4].contiguous().view(torch.float32)
    kind = torch.int8 if records.row_format == "int8" else torch.float8_e4m3fn
    return codes_LV.contiguous().view(kind).float() * scale_L1


def record_columns(records: RowRecords, columns: range) -> RowRecords:
    """Records of some contiguous columns of all rows, with the same codes and scales.

    Raises:
        ValueError: the columns of int4 rows are not whole groups.
    """
    row_format, first, last = records.row_format, columns.start, columns.stop
    value_dim, records_RB = records.value_dim, records.records_RB
    ends_inside = last % INT4_GROUP and last != value_dim
    if row_format == "int4" and (first % INT4_GROUP or ends_inside):
        where = f"columns {first} to {last} do not have whole groups of {INT4_GROUP} values"
        raise ValueError(f"row_format: int4: {where}")
    start, size = scale_offset(row_format, value_dim), scale_bytes(row_format, value_dim)
    scales_RS = records_RB[:, start : start + size]
    if row_format in _INT4_SCALES:
        codes_RV = _int4_codes(records_RB[:, :start])
        codes_RC = _packed_int4(codes_RV[:, first:last])
    else:
        codes_RC = records_RB[:, first:last]
    made = _zero_records(records_RB, row_format, last - first)
    if row_format == "int4":
        # the scales of its groups; those that pad the last block stay 0
        scales_RS = scales_RS[:, 2 * (first // INT4_GROUP) : 2 * -(-last // INT4_GROUP)]
        missing = scale_bytes(row_format, last - first) - scales_RS.shape[1]
        scales_RS = torch.nn.functional.pad(scales_RS, (0, missing))
    _fill(made, codes_RC, scales_RS)
    return made


def _padded_to_blocks(value_dim: int) -> int:
    return -(-value_dim // INT4_BLOCK) * INT4_BLOCK


def _zero_records(rows: Tensor, row_format: RowFormat, value_dim: int) -> RowRecords:
    """Records of zero bytes for as many rows, on their device."""
    shape = len(rows), row_bytes(row_format, value_dim)
    records_RB = torch.zeros(shape, dtype=torch.uint8, device=rows.device)
    return RowRecords(records_RB, row_format, value_dim)


def _fill(records: RowRecords, codes_RC: Tensor, scales_RS: Tensor) -> None:
    """Write stored codes (uint8) and scales into records."""
    start = scale_offset(records.row_format, records.value_dim)
    size = scale_bytes(records.row_format, records.value_dim)
    records.records_RB[:, : codes_RC.shape[1]] = codes_RC
    records.records_RB[:, start : start + size] = scales_RS.contiguous().view(torch.uint8)


def _round_bytes(values_RV: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    largest = 127.0 if row_format == "int8" else _FP8_LARGEST
    scale_R1 = values_RV.abs().amax(dim=1, keepdim=True) / largest
    scaled_RV = _quotient(values_RV, scale_R1).clamp(-largest, largest)
    codes_RV = scaled_RV.round().to(torch.int8)
    if row_format == "fp8":
        codes_RV = scaled_RV.to(torch.float8_e4m3fn)
    return codes_RV.view(torch.uint8), scale_R1


def _round_int4(values_RV: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    num_rows, value_dim = values_RV.shape
    width = _padded_to_blocks(value_dim)
    group = INT4_GROUP if row_format == "int4" else width
    padded_RV = torch.nn.functional.pad(values_RV, (0, width - value_dim))
    groups_RGC = padded_RV.view(num_rows, -1, group)
    at_RG1 = groups_RGC.abs().argmax(dim=2, keepdim=True)
    # values are divided by the rounded scale, so that its rounding adds no error
    scale_RG1 = (groups_RGC.gather(2, at_RG1) / -8).to(_INT4_SCALES[row_format])
    codes_RGC = (_quotient(groups_RGC, scale_RG1.float()).round() + 8).clamp(0, 15)
    codes_RV = codes_RGC.view(num_rows, width).to(torch.uint8)
    return _packed_int4(codes_RV), scale_RG1.squeeze(2)


def _packed_int4(codes_RV: Tensor) -> Tensor:
    num_rows, value_dim = codes_RV.shape
    padding = _padded_to_blocks(value_dim) - value_dim
    # 8 stands for 0
    codes_RV = torch.nn.functional.pad(codes_RV, (0, padding), value=8)
    # [block, plane, word] of 4 bits each, to [block, word, byte] of two planes
    planes = codes_RV.view(num_rows, -1, 8, 16).transpose(2, 3)
    return (planes[..., 0::2] | planes[..., 1::2] << 4).reshape(num_rows, -1)


def _int4_codes(packed_LB: Tensor) -> Tensor:
    """The codes of whole blocks, from 0 to 15."""
    packed = torch.unflatten(packed_LB, 1, (-1, 16, 4))
    planes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(3)
    return planes.transpose(2, 3).flatten(1)


def _unpack_int4(records_LB: Tensor, value_dim: int, row_format: RowFormat) -> Tensor:
    num_rows, width = len(records_LB), _padded_to_blocks(value_dim)
    start, size = scale_offset(row_format, value_dim), scale_bytes(row_format, value_dim)
    stored = records_LB[:, start : start + size].contiguous().view(_INT4_SCALES[row_format])
    num_groups = stored.shape[1]
    codes_LV = _int4_codes(records_LB[:, :start])
    codes_LGC = codes_LV.view(num_rows, num_groups, width // num_groups).float()
    return ((codes_LGC - 8) * stored.float().unsqueeze(2)).flatten(1)[:, :value_dim]


def _quotient(values: Tensor, scale: Tensor) -> Tensor:
    """The quotient; 0 where the scale is 0, as in a row or group of zeros."""
    return torch.where(scale == 0, 0.0, values / scale)
