"""Row records: layout, rounding errors, and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops import row_formats
from memory_ops.native.backend import NativeBackend
from memory_ops.operations import quantize_rows
from memory_ops.row_formats import (
    ROW_FORMATS,
    RowRecords,
    dequantize_rows,
    int4_row_records,
    record_columns,
    row_bytes,
)
from tests.memory_ops.builds import each_build

WIDTHS = st.sampled_from([1, 4, 31, 32, 33, 127, 128, 129, 576, 1000, 1024])
# largest rounding error as a fraction of the largest value of the row (int8) or group (int4);
# int4 has one step less on the positive side; e4m3 has three fraction bits
HALF_STEPS = {"int8": 0.5 / 127, "int4": 1 / 8, "int4_row": 1 / 8, "fp8": 1 / 16}


@given(
    row_format=st.sampled_from(ROW_FORMATS),
    width=WIDTHS,
    num_rows=st.sampled_from([0, 1, 7]),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_values_come_back_within_half_a_step(row_format, width, num_rows, size):
    values = torch.randn(num_rows, width) * size
    records = quantize_rows(values, row_format)
    again = dequantize_rows(records)
    assert again.shape == values.shape and again.dtype == torch.float32
    largest = values.abs().amax(1, keepdim=True) if num_rows else values
    # bf16 scales have a relative error of at most 1/256
    allowed = largest * HALF_STEPS[row_format] * (1 + 1 / 128)
    if row_format == "int4_row":
        allowed += 8 * 2**-25  # half the smallest scale, for 8 steps
    assert ((again - values).abs() <= allowed).all()
    assert records.records_RB.shape == (num_rows, row_bytes(row_format, width))
    # rounding twice changes nothing
    torch.testing.assert_close(dequantize_rows(quantize_rows(again, row_format)), again)


@given(row_format=st.sampled_from(ROW_FORMATS), width=WIDTHS)
def test_records_fill_whole_cache_lines_and_unused_bytes_are_zero(row_format, width):
    values = torch.full((3, width), -1.0)
    records = quantize_rows(values, row_format).records_RB
    assert records.shape[1] % 64 == 0
    blocks = -(-width // 128)
    used = {"int4": blocks * 72, "int4_row": blocks * 64 + 2}.get(
        row_format, -(-width // 4) * 4 + 4
    )
    assert not records[:, used:].any()
    assert records.shape[1] - used < 64


@pytest.mark.parametrize(
    ("row_format", "width", "wanted"),
    [
        *(("int8", 1024, 1088), ("fp8", 1024, 1088), ("int4", 1024, 576), ("int4", 1, 128)),
        *(("int4_row", 384, 256), ("int4_row", 1024, 576), ("int4_row", 1, 128)),
    ],
)
def test_bytes_of_a_record(row_format, width, wanted):
    assert row_bytes(row_format, width) == wanted


def test_an_int8_record_is_its_values_then_its_scale():
    record = quantize_rows(torch.tensor([[127.0, -127.0, 0.6, 0.4, -1.0]]), "int8").records_RB[0]
    assert record[:5].view(torch.int8).tolist() == [127, -127, 1, 0, -1]
    assert record[8:12].view(torch.float32).item() == 1.0


def test_an_fp8_record_is_its_values_then_its_scale():
    record = quantize_rows(torch.tensor([[448.0, -1.0, 0.0625]]), "fp8").records_RB[0]
    assert record[:3].view(torch.float8_e4m3fn).tolist() == [448.0, -1.0, 0.0625]
    assert record[4:8].view(torch.float32).item() == 1.0


def test_an_int4_record_is_planes_of_sixteen_then_a_scale_for_each_group():
    # value p * 16 + d identifies plane and position; the largest of a group becomes -8
    values = torch.zeros(1, 256)
    values[0, 0::32] = -8.0
    values[0, 128:] *= 2
    values[0, 16 * 3 + 5] = 7.0
    record = quantize_rows(values, "int4").records_RB[0]
    words = record[:128].view(torch.int32).tolist()
    assert words[5] >> 12 & 15 == 7 + 8
    assert [words[0] >> 4 * plane & 15 for plane in range(8)] == [0, 8] * 4
    assert record[128:144].view(torch.bfloat16).tolist() == [1.0] * 4 + [2.0] * 4


def test_an_int4_row_record_is_planes_of_sixteen_then_the_scale_of_the_row():
    values = torch.zeros(1, 256)
    values[0, 16 * 3 + 5], values[0, 128] = 7.0, -8.0
    record = quantize_rows(values / 2, "int4_row").records_RB[0]
    words = record[:128].view(torch.int32).tolist()
    assert words[5] >> 12 & 15 == 7 + 8 and words[16] & 15 == 0
    assert record[128:130].view(torch.float16).item() == 0.5


@given(
    width=WIDTHS,
    # finite fp16 numbers of both signs, zeros and subnormal numbers among them
    scales=st.lists(st.integers(0, 0x7BFF) | st.integers(-0x8000, -0x401), min_size=1, max_size=5),
)
def test_int4_row_records_of_codes_and_scales_are_exact(width, scales):
    scale = torch.tensor(scales, dtype=torch.int16).view(torch.float16)
    codes = torch.randint(0, 16, (len(scales), width), dtype=torch.uint8)
    records = int4_row_records(codes, scale)
    assert torch.equal(dequantize_rows(records), (codes.float() - 8) * scale.float()[:, None])


@each_build
def test_int4_row_refuses_values_whose_scale_overflows(build):
    least = torch.tensor([[0.0], [-524_160.0]])
    for quantize in (NativeBackend(build).quantize_rows, row_formats.quantize_rows):
        with pytest.raises(ValueError, match="values: row 1 has .* not finite, or of 524160 and"):
            quantize(least, "int4_row")
        most = quantize(torch.nextafter(least, torch.tensor(0.0)), "int4_row")
        assert dequantize_rows(most).tolist() == [[0.0], [-8 * 65_504.0]]


def test_rows_of_zeros_stay_zeros():
    for row_format in ROW_FORMATS:
        records = quantize_rows(torch.zeros(2, 33), row_format)
        assert torch.equal(dequantize_rows(records), torch.zeros(2, 33))


def test_selected_rows_are_dequantized():
    for row_format in ROW_FORMATS:
        records = quantize_rows(torch.randn(9, 200), row_format)
        rows = torch.tensor([3, 3, 8])
        assert torch.equal(dequantize_rows(records, rows), dequantize_rows(records)[rows])
        with pytest.raises(IndexError):
            dequantize_rows(records, torch.tensor([9]))


def test_values_that_cannot_be_rounded_are_refused():
    values = torch.randn(4, 8)
    values[2, 3] = torch.inf
    for row_format in ROW_FORMATS:
        with pytest.raises(ValueError, match="values: row 2"):
            quantize_rows(values, row_format)
        with pytest.raises(ValueError, match="values: expected"):
            quantize_rows(torch.zeros(4), row_format)
        with pytest.raises(ValueError, match="values: expected"):
            quantize_rows(torch.zeros(4, 4, dtype=torch.int64), row_format)
    with pytest.raises(ValueError, match="row_format: 'int2' is not one of int8, int4, int4_row"):
        quantize_rows(torch.zeros(4, 8), "int2")


def test_records_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected uint8 \[R, 64\]"):
        RowRecords(torch.zeros(4, 63, dtype=torch.uint8), "int8", 8)
    with pytest.raises(ValueError, match="expected uint8"):
        RowRecords(torch.zeros(4, 64), "int8", 8)
    with pytest.raises(ValueError, match="value_dim"):
        RowRecords(torch.zeros(4, 64, dtype=torch.uint8), "int8", 0)


@each_build
@given(
    row_format=st.sampled_from(ROW_FORMATS),
    width=WIDTHS,
    num_rows=st.sampled_from([0, 1, 2, 7]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    # the smallest sizes give subnormal values and subnormal scales
    size=st.sampled_from([1e-44, 1e-39, 3e-6, 1e-3, 1.0, 6e4, 1e38]),
    seed=st.integers(0, 2**32),
)
def test_native_records_equal_torch_bit_for_bit(
    build, row_format, width, num_rows, dtype, size, seed
):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(num_rows, width, generator=generator) * size).to(dtype)
    # ties between the largest of a group, halves of a step, zeros of both signs
    values[:, ::3] = values[:, ::3].sign() * size
    values[:, 1::5] = torch.tensor(size / 2).to(dtype)
    values[:, 2::7] = -0.0
    # bf16 rounds it up to 520,192, which is still less than the first value that is refused
    largest = 520_000 if row_format == "int4_row" else torch.finfo(torch.float32).max
    largest = min(largest, torch.finfo(dtype).max)
    values = values.clamp(-largest, largest)
    # rows of a wider matrix have gaps between them
    strided = torch.cat([values, torch.full_like(values, torch.nan)], dim=1)[:, :width]
    found = NativeBackend(build).quantize_rows(strided, row_format)
    assert torch.equal(found.records_RB, row_formats.quantize_rows(strided, row_format).records_RB)


@each_build
@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_native_kernels_name_the_first_row_that_is_not_finite(build, row_format, wrong):
    values = torch.randn(50, 200)
    values[[31, 17, 49], [199, 0, 5]] = wrong
    with pytest.raises(ValueError, match="values: row 17 has values that are not finite"):
        NativeBackend(build).quantize_rows(values, row_format)


@given(
    row_format=st.sampled_from(row_formats.ROW_FORMATS),
    groups=st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(0, 5)),
    rest=st.integers(0, 31),
)
def test_records_of_columns_have_the_same_values(row_format, groups, rest):
    first, count, after = (32 * one for one in groups)
    columns = range(first, first + count + (rest if not after else 0))
    values = torch.randn(3, columns.stop + after)
    records = quantize_rows(values, row_format)
    part = record_columns(records, columns)
    assert part.value_dim == len(columns)
    expected = dequantize_rows(records)[:, columns.start : columns.stop]
    assert torch.equal(dequantize_rows(part), expected)


def test_int4_groups_are_not_split():
    records = quantize_rows(torch.randn(2, 96), "int4")
    for columns in (range(16, 96), range(0, 48)):
        with pytest.raises(ValueError, match="whole groups of 32"):
            record_columns(records, columns)
