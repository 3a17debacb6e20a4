"""The top-K kernel against the reference: the same rows, in the same order."""

import pytest
import torch
from torch import Tensor

from memory_ops import reference
from memory_ops.triton_kernels import product_topk
from tests.conftest import TOLERANCE
from tests.memory_ops.table_kinds import vast_rows

# N of one tile, powers of two or not; N of several tiles, the last one full or partly filled
SIZES = [(1, 1), (2, 1), (2, 2), (37, 5), (64, 32), (130, 33), (128, 128), (1024, 32), (2048, 9)]
STREAMED = [(1025, 2), pytest.param(5000, 32, marks=pytest.mark.slow), (2500, 128)]


def check(scores: Tensor, top_k: int) -> None:
    rows, weights = product_topk(scores, top_k)
    wanted, wanted_weights = reference.product_topk(scores, top_k)
    assert rows.dtype == torch.int64 and torch.equal(rows, wanted)
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(weights, wanted_weights, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("num_subkeys", "top_k"), SIZES + STREAMED)
def test_rows_equal_the_reference(num_subkeys, top_k):
    check(torch.randn(2, 1, 2, num_subkeys), top_k)


@pytest.mark.parametrize(("num_subkeys", "top_k"), SIZES + STREAMED)
def test_ties_go_to_the_smaller_subkeys_and_ranks(num_subkeys, top_k):
    # a few whole numbers whose sums tie exactly; the greatest are zeros of both signs
    scores = torch.randint(-2, 1, (1, 2, 2, num_subkeys)).float()
    scores = torch.where((scores == 0) & (torch.rand(scores.shape) < 0.5), -0.0, scores)
    check(scores, top_k)


def test_scores_whose_exponentials_overflow():
    check(1000 * torch.randn(4, 2, 2, 30), 8)
    check(torch.randn(4, 2, 2, 30) - 1000, 8)


def test_all_equal_scores():
    check(torch.full((1, 1, 2, 70), -0.0), 33)


@pytest.mark.parametrize("num_subkeys", [5, pytest.param(70, marks=pytest.mark.slow), 1100])
def test_scores_of_minus_infinity_come_last(num_subkeys):
    scores = torch.randn(3, 2, 2, num_subkeys)
    scores[0] = -torch.inf
    scores[1, :, :, 2:] = -torch.inf
    scores[2, :, 1] = -torch.inf
    check(scores, 5)


@pytest.mark.parametrize("num_subkeys", [6, pytest.param(70, marks=pytest.mark.slow), 1100])
def test_nan_never_gives_a_row_out_of_range(num_subkeys):
    scores = torch.randn(3, 2, 2, num_subkeys)
    scores[torch.rand(scores.shape) < 0.3] = torch.nan
    scores[torch.rand(scores.shape) < 0.1] = -torch.nan
    scores[torch.rand(scores.shape) < 0.1] = torch.inf
    scores[torch.rand(scores.shape) < 0.1] = -torch.inf
    scores[1] = torch.nan
    rows, weights = product_topk(scores, 6)
    assert rows.min() >= 0 and rows.max() < num_subkeys**2
    assert weights.isnan().all()


def test_one_finite_score_among_nan():
    scores = torch.full((1, 1, 2, 8), -torch.inf)
    scores[0, 0, 0, 3] = torch.nan
    rows, weights = product_topk(scores, 4)
    assert rows[0, 0, 0] == 3 * 8
    assert weights.isnan().all()


@pytest.mark.slow
def test_row_ids_pass_2_to_the_31():
    # N * N passes 2**31 at 46,341; the best subkeys are the last
    scores = torch.zeros(1, 1, 2, 65536)
    scores[0, 0, :, -2:] = torch.tensor([[1.0, 9.0], [3.0, 9.0]])
    rows, _ = product_topk(scores, 4)
    assert torch.equal(rows, reference.product_topk(scores, 4)[0])
    pairs = [(65535, 65535), (65535, 65534), (65534, 65535), (65535, 0)]
    assert rows.tolist() == [[[first * 65536 + second for first, second in pairs]]]


def test_offsets_pass_2_to_the_31():
    scores = torch.randn(4, 2, 2, 20)
    rows, _ = product_topk(vast_rows(scores.flatten(1)).view(4, 2, 2, 20), 3)
    assert torch.equal(rows, reference.product_topk(scores, 3)[0])


def test_scores_of_any_layout():
    check(torch.randn(20, 3, 2, 2).transpose(0, 3), 7)


@pytest.mark.parametrize("shape", [(0, 2, 2, 4), (2, 0, 2, 4)])
def test_no_tokens_or_no_heads_give_no_rows(shape):
    rows, weights = product_topk(torch.zeros(shape), 3)
    assert rows.shape == weights.shape == (*shape[:2], 3)


def test_topk_refuses_unsupported_operands():
    with pytest.raises(ValueError, match="top_k: 5 is outside"):
        product_topk(torch.zeros(1, 1, 2, 4), 5)
    with pytest.raises(ValueError, match="top_k: .* up to 128, not 129"):
        product_topk(torch.zeros(1, 1, 2, 200), 129)
    with pytest.raises(ValueError, match="65536 subkeys, not 65537"):
        product_topk(torch.zeros(1, 1, 2, 65537), 2)
    with pytest.raises(ValueError, match="half_scores: expected torch.float32"):
        product_topk(torch.zeros(1, 1, 2, 4, dtype=torch.float64), 2)
