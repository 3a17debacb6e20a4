"""The inner product kernels against the reference in fp64."""

import pytest
import torch

from memory_ops import reference
from memory_ops.row_formats import ROW_FORMATS
from memory_ops.triton_kernels import row_dots
from memory_ops.triton_kernels.launch import constant_row_stride
from tests.memory_ops.table_kinds import (
    KINDS,
    check_close,
    exact_values,
    num_rows,
    rows_of,
    table_of,
    vast_rows,
    vast_table,
    with_gaps,
    with_padding_filled,
)


@pytest.mark.parametrize(
    "width", [99, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 64, 1100))]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 3, 7)])
def test_dots_of_rows_and_vectors(kind, width, shape):
    table, x = table_of(kind, torch.randn(50, width)), torch.randn(shape[0], width)
    rows = rows_of(table, *shape)
    exact = reference.row_dots(exact_values(table), rows, x)
    check_close(row_dots(table, rows, x), exact, width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_row_gives_the_same_dots(kind):
    table, x = table_of(kind, torch.randn(1, 40)), torch.randn(2, 40)
    dots = row_dots(table, torch.zeros(2, 2, 5, dtype=torch.int64), x)
    exact = reference.row_dots(exact_values(table), torch.zeros(2, 1, 1, dtype=torch.int64), x)
    check_close(dots, exact.expand(2, 2, 5), 40)
    assert (dots == dots[:, :1, :1]).all()


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 1, 0)])
def test_an_empty_lookup_gives_no_dots(shape):
    rows, x = torch.zeros(shape, dtype=torch.int64), torch.randn(shape[0], 8)
    assert row_dots(torch.randn(4, 8), rows, x).shape == shape


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "int4_row"])
def test_offsets_pass_2_to_the_31(kind):
    last, x = torch.randn(3, 100), torch.randn(4, 100)
    table = vast_table(kind, last)
    rows = torch.randint(0, 3, (4, 1, 4))
    exact = reference.row_dots(exact_values(table_of(kind, last)), rows, x)
    check_close(row_dots(table, rows + num_rows(table) - 3, vast_rows(x)), exact, 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_of_less_precision_and_any_layout(dtype):
    table, rows = torch.randn(9, 16), torch.randint(0, 9, (3, 2, 2))
    x = torch.randn(16, 3).to(dtype).t()
    exact = reference.row_dots(table.double(), rows, x)
    check_close(row_dots(table, rows, x), exact, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_wider_matrix_in_any_order(kind):
    table, x = table_of(kind, torch.randn(9, 70)), torch.randn(4, 70)
    rows = rows_of(table, 3, 2, 4).transpose(0, 2)
    exact = reference.row_dots(exact_values(table), rows, x)
    check_close(row_dots(with_gaps(table), rows, x), exact, 70)


@pytest.mark.parametrize("kind", ROW_FORMATS)
def test_padding_of_records_is_not_read(kind):
    table, x = table_of(kind, torch.randn(9, 99)), torch.randn(2, 99)
    rows = rows_of(table, 2, 1, 4)
    assert torch.equal(row_dots(with_padding_filled(table), rows, x), row_dots(table, rows, x))


def test_rows_of_width_zero_have_dots_of_zero():
    dots = row_dots(torch.zeros(4, 0), torch.zeros(2, 1, 3, dtype=torch.int64), torch.zeros(2, 0))
    assert torch.equal(dots, torch.zeros(2, 1, 3))


def test_the_stride_of_a_single_vector_is_no_constant_of_the_kernel():
    # or each length of the text it is taken from would compile a kernel of its own
    assert constant_row_stride(torch.zeros(1, 99, 8)[:, 98]) == 8
    assert constant_row_stride(torch.zeros(2, 99, 8)[:, 98]) == 99 * 8


def test_dots_refuse_unsupported_operands():
    rows = torch.zeros(1, 1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="x: the Triton kernels support .*, not torch.float64"):
        row_dots(torch.zeros(4, 3), rows, torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="rows and x"):
        row_dots(torch.zeros(4, 3), rows, torch.zeros(1, 4))
