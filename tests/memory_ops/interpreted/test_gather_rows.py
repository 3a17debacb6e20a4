"""The gather kernels against the reference in fp64."""

import pytest
import torch

from memory_ops import reference
from memory_ops.row_formats import ROW_FORMATS, RowRecords
from memory_ops.triton_kernels import gather_rows
from tests.memory_ops.table_kinds import (
    KINDS,
    check_close,
    exact_values,
    num_rows,
    rows_of,
    table_of,
    vast_table,
    with_gaps,
    with_padding_filled,
)


# 64 fills 128-bit loads, 99 does not; 1100 takes several blocks, the last one partly filled
@pytest.mark.parametrize(
    "width", [1100, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 64, 99))]
)
@pytest.mark.parametrize("kind", KINDS)
# one row of one head; more choices than a program reads at once with K not a power of two
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 3, 7)])
def test_gather_sums_weighted_rows(kind, width, shape):
    table = table_of(kind, torch.randn(50, width))
    rows, weights = rows_of(table, *shape), torch.rand(shape)
    exact = reference.gather_rows(exact_values(table), rows, weights)
    check_close(gather_rows(table, rows, weights), exact, shape[1] * shape[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_row_counts_each_time(kind):
    table = table_of(kind, torch.randn(1, 40))
    rows, weights = torch.zeros(2, 2, 5, dtype=torch.int64), torch.rand(2, 2, 5)
    exact = reference.gather_rows(exact_values(table), rows, weights)
    check_close(gather_rows(table, rows, weights), exact, 10)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 1, 0)])
def test_an_empty_lookup_gives_zeros(shape):
    out = gather_rows(torch.randn(4, 8), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
    torch.testing.assert_close(out, torch.zeros(shape[0], 8))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "int4_row"])
def test_offsets_pass_2_to_the_31(kind):
    last = torch.randn(3, 100)
    table = vast_table(kind, last)
    rows, weights = torch.randint(0, 3, (2, 1, 4)), torch.rand(2, 1, 4)
    exact = reference.gather_rows(exact_values(table_of(kind, last)), rows, weights)
    check_close(gather_rows(table, rows + num_rows(table) - 3, weights), exact, 4)


def test_outputs_pass_2_to_the_31(vast_outputs):
    num_tokens, width = 2**21 + 1, 1024
    table, rows = torch.randn(9, width), torch.randint(0, 9, (num_tokens, 1, 1))
    out = gather_rows(table, rows, torch.ones(rows.shape))
    assert torch.equal(out[-2:], table[rows[-2:, 0, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_unread_rows_may_hold_nan(kind):
    # lanes past the last choice read no row, not even row 0
    table = table_of(kind, torch.randn(3, 40))
    if isinstance(table, RowRecords):
        table.records_RB[:2] = 0xFF
    else:
        table[:2] = torch.nan
    rows, weights = torch.full((1, 1, 3), 2), torch.rand(1, 1, 3)
    exact = reference.gather_rows(exact_values(table)[2:], rows - 2, weights)
    check_close(gather_rows(table, rows, weights), exact, 3)


@pytest.mark.slow
def test_every_fp8_code_is_exact():
    codes = torch.arange(256, dtype=torch.uint8)
    is_number = codes & 0x7F != 0x7F
    codes = codes[is_number]
    records = torch.zeros(len(codes), 64, dtype=torch.uint8)
    records[:, 0] = codes
    records[:, 4:8] = torch.tensor([0.5]).view(torch.uint8)
    table = RowRecords(records, "fp8", 1)
    rows = torch.arange(len(codes)).view(-1, 1, 1)
    out = gather_rows(table, rows, torch.ones(rows.shape))
    assert torch.equal(out[:, 0], codes.view(torch.float8_e4m3fn).float() / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_precision_and_layout(dtype):
    table, rows = torch.randn(9, 16), torch.randint(0, 9, (7, 2, 3)).transpose(0, 2)
    weights = torch.rand(7, 2, 3).to(dtype).transpose(0, 2)
    exact = reference.gather_rows(table.double(), rows, weights)
    check_close(gather_rows(table, rows, weights), exact, 14)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_wider_matrix(kind):
    table = table_of(kind, torch.randn(9, 70))
    rows, weights = rows_of(table, 2, 1, 4), torch.rand(2, 1, 4)
    exact = reference.gather_rows(exact_values(table), rows, weights)
    check_close(gather_rows(with_gaps(table), rows, weights), exact, 4)


def test_rows_at_unaligned_addresses():
    table = torch.randn(9, 67)[:, 1:66].bfloat16()[:, 1:]
    assert table.data_ptr() % 4 == 2
    rows, weights = rows_of(table, 2, 1, 4), torch.rand(2, 1, 4)
    exact = reference.gather_rows(table.double(), rows, weights)
    check_close(gather_rows(table, rows, weights), exact, 4)


@pytest.mark.parametrize("kind", ROW_FORMATS)
def test_padding_of_records_is_not_read(kind):
    table = table_of(kind, torch.randn(9, 99))
    rows, weights = rows_of(table, 2, 1, 4), torch.rand(2, 1, 4)
    assert torch.equal(
        gather_rows(with_padding_filled(table), rows, weights), gather_rows(table, rows, weights)
    )


def test_gather_refuses_unsupported_operands():
    rows, weights = torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="table: the Triton kernels support .*, not torch.float64"):
        gather_rows(torch.zeros(4, 3, dtype=torch.float64), rows, weights)
    with pytest.raises(ValueError, match="expected contiguous values"):
        gather_rows(torch.zeros(4, 3).t(), rows, weights)
    with pytest.raises(ValueError, match="rows and weights"):
        gather_rows(torch.zeros(4, 3), rows, torch.zeros(1, 1, 3))
    records = torch.zeros(4, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="records: .* aligned to 64"):
        gather_rows(RowRecords(records[:, 8:72], "int8", 8), rows, weights)
    odd = torch.frombuffer(bytearray(1 + 4 * 64), dtype=torch.uint8, offset=1).view(4, 64)
    assert odd.storage_offset() == 0
    with pytest.raises(ValueError, match="records: .* aligned to 64"):
        gather_rows(RowRecords(odd, "int8", 8), rows, weights)
