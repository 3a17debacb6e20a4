"""The weighted row sum in every native build, for tables of every kind."""

import ctypes
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops import reference
from memory_ops.native.backend import NativeBackend
from memory_ops.row_formats import RowRecords
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

# widths around those of vectors, tiles, int4 blocks and their lines of scales, and thread shares
WIDTHS = st.one_of(
    st.integers(1, 40), st.sampled_from([64, 96, 127, 128, 129, 200, 576, 1000, 1100, 2200])
)


def lookups(num_tokens, num_heads, top_k, rows, dtype=torch.float32):
    """(row ids, some repeated; weights)."""
    rows_THK = torch.randint(0, rows, (num_tokens, num_heads, top_k))
    if top_k > 1:
        rows_THK[..., 1] = rows_THK[..., 0]
    return rows_THK, torch.randn(num_tokens, num_heads, top_k).to(dtype)


def check(build, table, rows_THK, weights_THK):
    """Assert that the sums equal the exact ones within fp32 tolerance."""
    out_TV = NativeBackend(build).gather_rows(table, rows_THK, weights_THK)
    exact_TV = reference.gather_rows(exact_values(table), rows_THK, weights_THK.double())
    check_close(out_TV, exact_TV, rows_THK[:1].numel() or 1)


@each_build
@given(
    kind=st.sampled_from(KINDS),
    width=WIDTHS,
    num_tokens=st.sampled_from([0, 1, 2, 5, 33]),
    num_heads=st.integers(1, 3),
    top_k=st.sampled_from([1, 2, 7, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_sums_are_exact(build, kind, width, num_tokens, num_heads, top_k, dtype):
    table = table_of(kind, torch.randn(23, width))
    check(build, table, *lookups(num_tokens, num_heads, top_k, 23, dtype))


@each_build
@pytest.mark.parametrize("kind", KINDS)
def test_a_paper_sized_lookup(build, kind):
    table = table_of(kind, torch.randn(600, 1024))
    for num_tokens in (1, 16, 63):
        check(build, table, *lookups(num_tokens, 4, 32, 600))


@each_build
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_and_no_rows(build, kind):
    table = table_of(kind, torch.randn(1, 99))
    check(build, table, *lookups(3, 1, 1, 1))
    out = NativeBackend(build).gather_rows(
        table, torch.zeros(3, 2, 0, dtype=torch.int64), torch.zeros(3, 2, 0)
    )
    assert torch.equal(out, torch.zeros(3, 99))


@each_build
@pytest.mark.parametrize("kind", KINDS)
def test_rows_past_2_to_the_31_elements(build, kind):
    last = torch.randn(3, 40)
    table = vast_table(kind, last)
    rows, weights = lookups(4, 2, 3, 3)
    out = NativeBackend(build).gather_rows(table, rows + num_rows(table) - 3, weights)
    check_close(out, reference.gather_rows(exact_values(table_of(kind, last)), rows, weights), 6)


@each_build
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_values_of_a_kind(build, kind):
    # both ends of each range, both zeros, and a number that is subnormal in fp16
    values = torch.tensor([[6e4, -6e4, 0.0, -0.0, 1e-7, -1e-7, 1.0, -1.0] * 5, [0.0] * 40])
    check(build, table_of(kind, values), *lookups(2, 1, 2, 2))


@each_build
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("width", [1, 5, 37, 130])
def test_gaps_between_rows_are_not_read(build, kind, width):
    wide = torch.full((9, width + 11), torch.nan)
    wide[:, :width] = torch.randn(9, width)
    table = wide.to(PLAIN[kind])[:, :width]
    check(build, table, *lookups(5, 2, 3, 9))


@each_build
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 17, 37, 130, 1000, 1100])
def test_nothing_past_the_table_is_read(build, kind, width):
    # the table ends at a page boundary; a read of the next page kills this process
    table = table_of(kind, torch.randn(3, width))
    part = table.records_RB if isinstance(table, RowRecords) else table
    memory, pages = mmap.mmap(-1, 8 * mmap.PAGESIZE), 7 * mmap.PAGESIZE
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    whole = torch.frombuffer(memory, dtype=part.dtype)
    last = whole[pages // part.itemsize - part.numel() :][: part.numel()].view(part.shape)
    last.copy_(part)
    table = RowRecords(last, kind, width) if isinstance(table, RowRecords) else last
    NativeBackend(build).row_dots(table, torch.tensor([[[2, 1, 2, 2, 2]]]), torch.randn(1, width))
    check(build, table, *lookups(4, 1, 3, 3))


@each_build
def test_strided_operands(build):
    table = torch.randn(50, 24)[::2]
    rows, weights = lookups(6, 3, 8, 25)
    check(build, table, rows.transpose(1, 2), weights[:, :, ::1].transpose(1, 2))
    check(build, table, rows[::2], weights[::2])
    records = table_of("int8", torch.randn(50, 24))
    strided = RowRecords(records.records_RB[::2], "int8", 24)
    check(build, strided, rows, weights)


@each_build
@pytest.mark.parametrize("wrong", [-1, 25, 2**40, -(2**63)])
def test_a_row_outside_the_table_is_refused(build, wrong):
    rows, weights = lookups(3, 2, 4, 25)
    rows[1, 1, 2] = wrong
    with pytest.raises(IndexError, match=rf"rows: {wrong} is outside \[0, 25\)"):
        NativeBackend(build).gather_rows(torch.randn(25, 8), rows, weights)


@each_build
@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_has_the_same_bits_in_any_batch_on_any_number_of_threads(build, kind):
    # several groups of rows, tiles and lines of scales
    table = table_of(kind, torch.randn(40, 2200))
    rows, weights = lookups(9, 2, 35, 40)
    before = torch.get_num_threads()
    try:
        wanted = NativeBackend(build).gather_rows(table, rows, weights)
        check(build, table, rows, weights)
        for num_threads in (1, 2, 3, 5):
            torch.set_num_threads(num_threads)
            for num_tokens in (1, 2, 7, 9):
                out = NativeBackend(build).gather_rows(
                    table, rows[:num_tokens], weights[:num_tokens]
                )
                assert torch.equal(out, wanted[:num_tokens])
    finally:
        torch.set_num_threads(before)
