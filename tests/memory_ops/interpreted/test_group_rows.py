"""The grouping of reads against the reference."""

import pytest
import torch

from memory_ops import reference
from memory_ops.triton_kernels import group_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
# one read; fewer and more reads than a program places; all reads of one row
@pytest.mark.parametrize(
    ("shape", "num_rows"), [((1, 1, 1), 5), ((9, 2, 3), 11), ((40, 3, 5), 2**40), ((40, 3, 5), 1)]
)
def test_reads_of_one_row_are_grouped(dtype, shape, num_rows):
    rows, weights = torch.randint(0, num_rows, shape), torch.randn(shape).to(dtype)
    found, wanted = group_rows(rows, weights), reference.group_rows(rows, weights)
    for name in ("rows_U", "starts_U1", "tokens_L", "weights_L"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 1, 0)])
def test_no_reads_give_no_rows(shape):
    groups = group_rows(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
    assert groups.rows_U.shape == groups.tokens_L.shape == groups.weights_L.shape == (0,)
    assert groups.starts_U1.tolist() == [0]


def test_operands_of_any_layout():
    rows = torch.randint(0, 4, (2, 3, 5)).transpose(0, 1)
    weights = torch.rand(2, 5, 3).permute(2, 0, 1)
    found, wanted = group_rows(rows, weights), reference.group_rows(rows, weights)
    assert torch.equal(found.tokens_L, wanted.tokens_L)
    assert torch.equal(found.weights_L, wanted.weights_L)


def test_wrong_operands_are_refused():
    with pytest.raises(IndexError, match="rows: -1 is outside"):
        group_rows(torch.full((1, 1, 2), -1), torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="rows and weights: expected the same shape"):
        group_rows(torch.zeros(1, 1, 2, dtype=torch.int64), torch.ones(1, 1, 1))
