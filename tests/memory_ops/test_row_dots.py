"""Inner products of rows and vectors in every native build."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops import reference
from memory_ops.native.backend import NativeBackend
from tests.memory_ops.builds import each_build
from tests.memory_ops.table_kinds import (
    KINDS,
    PLAIN,
    check_close,
    exact_values,
    num_rows,
    table_of,
    vast_table,
)

WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 128, 129, 576, 1000, 1100]))


def check(build, table, rows_THK, x_TV):
    """Assert that the products equal the exact ones within fp32 tolerance."""
    dots_THK = NativeBackend(build).row_dots(table, rows_THK, x_TV)
    check_close(
        dots_THK, reference.row_dots(exact_values(table), rows_THK, x_TV.double()), x_TV.shape[1]
    )


@each_build
@given(
    kind=st.sampled_from(KINDS),
    width=WIDTHS,
    num_tokens=st.sampled_from([0, 1, 2, 33]),
    num_heads=st.integers(1, 3),
    top_k=st.sampled_from([1, 2, 7, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_products_are_exact(build, kind, width, num_tokens, num_heads, top_k, dtype):
    table = table_of(kind, torch.randn(23, width))
    rows = torch.randint(0, 23, (num_tokens, num_heads, top_k))
    check(build, table, rows, torch.randn(num_tokens, width).to(dtype))


@each_build
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("width", [1, 5, 37, 130])
def test_gaps_between_rows_are_not_read(build, kind, width):
    wide = torch.full((9, width + 11), torch.nan)
    wide[:, :width] = torch.randn(9, width)
    table = wide.to(PLAIN[kind])[:, :width]
    check(build, table, torch.randint(0, 9, (5, 2, 3)), torch.randn(5, width))


@each_build
@pytest.mark.parametrize("kind", KINDS)
def test_rows_past_2_to_the_31_elements(build, kind):
    last, x = torch.randn(3, 40), torch.randn(4, 40)
    table, rows = vast_table(kind, last), torch.randint(0, 3, (4, 2, 3))
    dots = NativeBackend(build).row_dots(table, rows + num_rows(table) - 3, x)
    check_close(dots, reference.row_dots(exact_values(table_of(kind, last)), rows, x.double()), 40)


@each_build
def test_strided_operands(build):
    table, x = torch.randn(50, 24)[::2], torch.randn(24, 6).t()
    rows = torch.randint(0, 25, (6, 8, 3)).transpose(1, 2)
    check(build, table, rows, x)


@each_build
def test_a_row_outside_the_table_is_refused(build):
    rows = torch.tensor([[[0, 4]]])
    with pytest.raises(IndexError, match=r"rows: 4 is outside \[0, 4\)"):
        NativeBackend(build).row_dots(torch.randn(4, 8), rows, torch.randn(1, 8))
