"""Gradients per distinct row read, in every native build."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops import reference
from memory_ops.native.backend import NativeBackend
from tests.memory_ops.builds import each_build
from tests.memory_ops.table_kinds import PLAIN, check_close


def check(build, rows_THK, weights_THK, grad_TV):
    """Assert distinct ascending row ids, and exact gradients within fp32 tolerance."""
    rows_U, sums_UV = NativeBackend(build).row_gradients(rows_THK, weights_THK, grad_TV)
    wanted_U, exact_UV = reference.row_gradients(rows_THK, weights_THK.double(), grad_TV.double())
    assert torch.equal(rows_U, wanted_U)
    check_close(sums_UV, exact_UV, max(rows_THK.numel(), 1))


@each_build
@given(
    num_rows=st.sampled_from([1, 3, 100, 3000, 2**21, 2**32]),
    width=st.one_of(st.integers(1, 40), st.sampled_from([128, 129, 256])),
    num_tokens=st.sampled_from([0, 1, 2, 33]),
    num_heads=st.integers(1, 3),
    top_k=st.sampled_from([1, 2, 7, 20]),
    kind=st.sampled_from(list(PLAIN)),
)
def test_the_gradients_are_exact(build, num_rows, width, num_tokens, num_heads, top_k, kind):
    rows = torch.randint(0, num_rows, (num_tokens, num_heads, top_k))
    weights = torch.randn(num_tokens, num_heads, top_k)
    check(build, rows, weights, torch.randn(num_tokens, width).to(PLAIN[kind]))


@each_build
def test_strided_operands(build):
    rows = torch.randint(0, 9, (6, 8, 3)).transpose(1, 2)
    weights = torch.randn(6, 8, 3).transpose(1, 2)
    check(build, rows, weights, torch.randn(24, 6).t())
    check(build, rows, weights, torch.randn(12, 24)[::2])


@each_build
def test_the_same_input_gives_the_same_bits(build):
    rows, weights = torch.randint(0, 5, (200, 4, 8)), torch.randn(200, 4, 8)
    grad = torch.randn(200, 40)
    first, again = (NativeBackend(build).row_gradients(rows, weights, grad)[1] for _ in range(2))
    assert torch.equal(first, again)


@each_build
@pytest.mark.parametrize("wrong", [-1, 2**33])
def test_a_row_id_that_no_table_has_is_refused(build, wrong):
    rows = torch.tensor([[[0, wrong]]])
    with pytest.raises(IndexError, match=f"rows: {wrong} is outside"):
        NativeBackend(build).row_gradients(rows, torch.ones(1, 1, 2), torch.ones(1, 4))
