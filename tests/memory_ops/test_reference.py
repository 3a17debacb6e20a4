"""The reference operations against direct formulas."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops.reference import (
    expert_lookup,
    gather_rows,
    product_topk,
    row_dots,
    row_gradients,
)
from tests.conftest import TOLERANCE

SIZES = st.tuples(
    st.sampled_from([1, 3, 17]), st.sampled_from([1, 4]), st.sampled_from([2, 7, 16, 37])
)


def all_scores(half_scores: torch.Tensor) -> torch.Tensor:
    """Scores of all rows ``[T, H, N * N]``, which product keys avoid computing."""
    first, second = half_scores.unbind(2)
    return (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)


@given(SIZES, st.integers(1, 37), st.integers(0, 2**32))
def test_topk_finds_the_best_of_all_rows(sizes, top_k, seed):
    num_tokens, num_heads, num_subkeys = sizes
    top_k = min(top_k, num_subkeys)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_heads, 2, num_subkeys, generator=generator)
    rows, weights = product_topk(scores, top_k)
    exact = all_scores(scores)
    best = exact.sort(dim=-1, descending=True).values[..., :top_k]
    torch.testing.assert_close(exact.gather(-1, rows), best, rtol=0, atol=0)
    torch.testing.assert_close(weights, best.double().softmax(-1).float())
    assert rows.dtype == torch.int64
    assert all(len(set(head)) == top_k for token in rows.tolist() for head in token)


def test_equal_scores_go_to_the_smaller_ranks():
    # whole numbers tie exactly: 5 + 1 = 4 + 2 in ranks (0, 1) and (1, 0)
    first, second = torch.tensor([4.0, 5.0, 4.0, 0.0]), torch.tensor([1.0, 2.0, 1.0, 2.0])
    rows, _ = product_topk(torch.stack([first, second])[None, None], 4)
    pairs = [(row // 4, row % 4) for row in rows[0, 0].tolist()]
    assert pairs == [(1, 1), (1, 3), (1, 0), (1, 2)]


def test_a_head_without_finite_scores_has_uniform_weights():
    scores = torch.full((1, 1, 2, 5), -torch.inf)
    rows, weights = product_topk(scores, 3)
    torch.testing.assert_close(weights, torch.full((1, 1, 3), 1 / 3))
    assert rows.min() >= 0 and rows.max() < 25


def test_nan_never_gives_a_row_out_of_range():
    scores = torch.randn(4, 2, 2, 6)
    scores[torch.rand_like(scores) < 0.5] = torch.nan
    rows, _ = product_topk(scores, 6)
    assert rows.min() >= 0 and rows.max() < 36


@pytest.mark.parametrize("top_k", [0, 5])
def test_topk_refuses_more_rows_than_subkeys(top_k):
    with pytest.raises(ValueError, match="top_k"):
        product_topk(torch.zeros(1, 1, 2, 4), top_k)


def test_topk_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="half_scores"):
        product_topk(torch.zeros(1, 1, 3, 4), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 63])
@pytest.mark.parametrize("width", [1, 24, 96])
def test_gather_accumulates_in_wide_precision(dtype, num_tokens, width):
    table = torch.randn(50, width).to(dtype)
    rows = torch.randint(0, 50, (num_tokens, 2, 5))
    rows[..., 1] = rows[..., 0]
    weights = torch.rand(num_tokens, 2, 5)
    out = gather_rows(table, rows, weights)
    exact = torch.zeros(num_tokens, width, dtype=torch.float64)
    for token in range(num_tokens):
        for row, weight in zip(
            rows[token].flatten().tolist(), weights[token].flatten(), strict=True
        ):
            exact[token] += weight.double() * table[row].double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rtol, atol = TOLERANCE[wide]
    torch.testing.assert_close(out, exact.to(wide), rtol=rtol, atol=atol * 10**0.5)


def test_gather_refuses_wrong_shapes():
    table, rows = torch.zeros(4, 3), torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows and weights"):
        gather_rows(table, rows, torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="table"):
        gather_rows(torch.zeros(4), rows, torch.zeros(1, 2, 2))
    with pytest.raises(IndexError):
        gather_rows(table, rows + 4, torch.zeros(1, 2, 2))


def test_dots_are_inner_products_of_rows_and_vectors():
    table, x = torch.randn(20, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    rows = torch.randint(0, 20, (5, 2, 3))
    dots = row_dots(table, rows, x)
    for token, head, place in itertools.product(range(5), range(2), range(3)):
        exact = sum(a * b for a, b in zip(table[rows[token, head, place]], x[token], strict=True))
        torch.testing.assert_close(dots[token, head, place], exact)


def test_row_gradients_sum_over_all_references_to_a_row():
    grad, weights = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 2, 3)
    rows = torch.randint(0, 6, (5, 2, 3))
    dense = torch.zeros(6, 7, dtype=torch.float64)
    for token, head, place in itertools.product(range(5), range(2), range(3)):
        dense[rows[token, head, place]] += weights[token, head, place].double() * grad[token]
    distinct, sums = row_gradients(rows, weights, grad)
    assert torch.equal(distinct, rows.unique())
    torch.testing.assert_close(sums, dense[distinct])


def test_an_expert_is_one_neuron():
    down, up = torch.randn(2, 9, 4, dtype=torch.float64).unbind()
    x, weights = torch.randn(1, 4, dtype=torch.float64), torch.tensor([[[0.5, -2.0]]])
    rows = torch.tensor([[[3, 8]]])
    exact = sum(
        weight * torch.nn.functional.gelu(down[row] @ x[0]) * up[row]
        for row, weight in ((3, 0.5), (8, -2.0))
    )
    torch.testing.assert_close(expert_lookup(down, up, rows, weights, x)[0], exact)
