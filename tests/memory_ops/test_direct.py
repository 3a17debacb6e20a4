"""The shortest way to the kernels: what it takes, what it declines, and that no result differs."""

import pytest
import torch

from memory_ops import backends, operations
from memory_ops.native.backend import NativeBackend
from memory_ops.native.direct import direct_calls
from tests.memory_ops.builds import each_build
from tests.memory_ops.tables import KINDS, table_of

if direct_calls("portable") is None:
    pytest.skip("needs Python's headers, and a torch that exchanges", allow_module_level=True)


@pytest.fixture
def direct():
    return backends.direct()


def lookups(num_tokens=3, rows=9):
    """Rows and weights of two heads."""
    return torch.randint(0, rows, (num_tokens, 2, 4)), torch.randn(num_tokens, 2, 4)


@each_build
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_it_gives_the_same_sums(build, kind, num_tokens):
    table, looked_up = table_of(kind, torch.randn(9, 200)), lookups(num_tokens)
    mine = direct_calls(build).gather_rows(table, *looked_up)
    assert torch.equal(mine, NativeBackend(build).gather_rows(table, *looked_up))


@each_build
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_it_chooses_the_same_rows(build, num_tokens):
    scores = torch.randn(num_tokens, 2, 2, 30)
    mine = direct_calls(build).product_topk(scores, 7)
    for my, their in zip(mine, NativeBackend(build).product_topk(scores, 7), strict=True):
        assert torch.equal(my, their)


def test_its_results_are_tensors_like_any(direct):
    rows, weights = direct.product_topk(torch.randn(3, 2, 2, 30), 4)
    out = direct.gather_rows(torch.randn(900, 5), rows, weights)
    assert type(out) is torch.Tensor and not out.requires_grad and out.is_contiguous()
    out.resize_(4).add_(1)
    with torch.inference_mode():
        assert direct.gather_rows(torch.randn(900, 5), rows, weights).is_inference()


def turned(tensor):
    """The same values in another order in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def test_it_declines_what_lies_otherwise(direct):
    table, (rows, weights) = torch.randn(9, 40), lookups()
    assert direct.gather_rows(table.t().contiguous().t(), rows, weights) is None
    assert direct.gather_rows(table.double(), rows, weights) is None
    assert direct.gather_rows(table, turned(rows), weights) is None
    assert direct.gather_rows(table, rows.int(), weights) is None
    assert direct.gather_rows(table, rows, turned(weights)) is None
    assert direct.gather_rows(table, rows, weights.bfloat16()) is None
    assert direct.gather_rows(table, rows, weights[1:]) is None
    assert direct.gather_rows(table[0], rows, weights) is None
    scores = torch.randn(3, 2, 2, 9)
    for given, top_k in ((turned(scores), 3), (scores.double(), 3), (scores[0], 3)):
        assert direct.product_topk(given, top_k) is None
    for top_k in (0, -1, 10, "3", None, 2**32 + 3, 2**70):
        assert direct.product_topk(scores, top_k) is None
    assert direct.product_topk(torch.randn(1, 1, 2, 200), 129) is None


def test_it_declines_what_is_more_than_its_values(direct):
    table, (rows, weights) = torch.randn(9, 40), lookups()
    wanted = weights.clone().requires_grad_()
    assert direct.gather_rows(table, rows, wanted) is None
    with torch.no_grad():
        assert direct.gather_rows(table, rows, wanted) is not None
    assert direct.gather_rows(torch.nn.Parameter(table), rows, weights) is None
    assert direct.gather_rows(torch._neg_view(table), rows, weights) is None
    assert direct.gather_rows(table.to("meta"), rows, weights) is None
    assert (
        direct.gather_rows(table.as_subclass(type("Sub", (torch.Tensor,), {})), rows, weights)
        is None
    )
    for nothing in (None, [1.0], "table"):
        assert direct.gather_rows(nothing, rows, weights) is None
    with pytest.raises(TypeError, match="takes 6 arguments"):
        direct._gather_rows(table)


def test_tables_whose_rows_lie_apart_and_parts_of_tensors_are_read_where_they_are(direct):
    table, (rows, weights) = torch.randn(9, 40), lookups(6)
    expected = direct.gather_rows(table, rows, weights)
    apart = torch.stack((table, table), dim=1)[:, 1]
    assert torch.equal(direct.gather_rows(apart, rows, weights), expected)
    assert torch.equal(direct.gather_rows(table, rows[2:], weights[2:]), expected[2:])


@pytest.mark.parametrize("wrong", [-1, 9, 2**62])
def test_a_row_outside_the_table_is_refused(wrong, direct):
    rows, weights = lookups()
    rows[1, 1, 2] = wrong
    for gather in (direct.gather_rows, operations.gather_rows):
        with pytest.raises(IndexError, match=rf"rows: {wrong} is outside \[0, 9\)"):
            gather(torch.zeros(9, 40), rows, weights)


def test_without_it_the_operations_are_the_same(monkeypatch):
    table, (rows, weights) = torch.randn(9, 40), lookups()
    scores = torch.randn(3, 2, 2, 9)
    short = operations.gather_rows(table, rows, weights), *operations.product_topk(scores, 3)
    monkeypatch.setattr(backends, "direct", lambda: None)
    long = operations.gather_rows(table, rows, weights), *operations.product_topk(scores, 3)
    assert all(map(torch.equal, short, long))
