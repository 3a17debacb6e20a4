"""The segment sum kernel against the reference in fp64."""

import sys

import pytest
import torch

from memory_ops import reference
from memory_ops.triton_kernels import row_gradients
from tests.memory_ops.table_kinds import PLAIN, check_close, vast_rows


@pytest.mark.parametrize("width", [1, 64, 99, 600])
@pytest.mark.parametrize("kind", PLAIN)
# one lookup; rows read once; rows with more lookups than a program takes at once
@pytest.mark.parametrize(("shape", "num_rows"), [((1, 1, 1), 1), ((3, 2, 3), 99), ((7, 2, 5), 3)])
def test_gradients_are_summed_by_row(kind, width, shape, num_rows):
    rows, weights = torch.randint(0, num_rows, shape), torch.rand(shape)
    grad = torch.randn(shape[0], width).to(PLAIN[kind])
    distinct, sums = row_gradients(rows, weights, grad)
    wanted, exact = reference.row_gradients(rows, weights, grad.double())
    assert torch.equal(distinct, wanted)
    check_close(sums, exact, rows.numel())


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 1, 0)])
def test_no_lookups_give_no_rows(shape):
    rows = torch.zeros(shape, dtype=torch.int64)
    distinct, sums = row_gradients(rows, torch.zeros(shape), torch.zeros(shape[0], 8))
    assert distinct.shape == (0,) and distinct.dtype == torch.int64
    assert sums.shape == (0, 8) and sums.dtype == torch.float32


def test_row_ids_and_offsets_pass_2_to_the_31():
    rows = torch.tensor([2**40, 5, 5, 2**31, 7, 7, 2**40, 5]).view(4, 1, 2)
    weights, grad = torch.rand(4, 1, 2), torch.randn(4, 100)
    distinct, sums = row_gradients(rows, weights, vast_rows(grad))
    wanted, exact = reference.row_gradients(rows, weights, grad.double())
    assert torch.equal(distinct, wanted)
    check_close(sums, exact, 8)


def test_outputs_pass_2_to_the_31(vast_outputs, monkeypatch):
    # the fixture skips programs, which would leave reads without a group
    module = sys.modules["memory_ops.triton_kernels.row_gradients"]
    monkeypatch.setattr(module, "group_rows", reference.group_rows)
    shape, width = (2**11 + 1, 32, 32), 1024
    rows, grad = torch.arange(shape[0] * 32 * 32).view(shape), torch.randn(shape[0], width)
    distinct, sums = row_gradients(rows, torch.ones(shape), grad)
    assert torch.equal(distinct, rows.flatten())
    assert torch.equal(sums[-2:], grad[-1:].expand(2, width))


def test_gradients_of_unread_tokens_may_hold_nan():
    # lanes past the last lookup of a row read no token, not even the first
    rows, grad = torch.tensor([1, 0, 0]).view(3, 1, 1), torch.randn(3, 40)
    grad[0] = torch.nan
    _, sums = row_gradients(rows, torch.ones(3, 1, 1), grad)
    torch.testing.assert_close(sums[0], grad[1] + grad[2])


def test_the_same_bits_every_time():
    rows, weights, grad = torch.randint(0, 2, (9, 2, 5)), torch.rand(9, 2, 5), torch.randn(9, 30)
    once, again = (row_gradients(rows, weights, grad)[1] for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_any_layout(dtype):
    rows = torch.randint(0, 4, (2, 3, 2)).transpose(0, 1)
    weights = torch.rand(2, 2, 3).to(dtype).permute(2, 0, 1)
    grad = torch.randn(16, 3).t()
    _, sums = row_gradients(rows, weights, grad)
    _, exact = reference.row_gradients(rows, weights, grad.double())
    check_close(sums, exact, 12)


def test_gradients_refuse_unsupported_operands():
    rows, weights = torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="grad: the Triton kernels support .*, not torch.float64"):
        row_gradients(rows, weights, torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="grad: expected"):
        row_gradients(rows, weights, torch.zeros(2, 3))
