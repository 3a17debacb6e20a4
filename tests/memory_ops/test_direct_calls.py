"""The kernels called with tensors as they are: what that takes, and that it changes no result."""

import ctypes

import pytest
import torch

from memory_ops.native import backend, direct_calls
from memory_ops.native.backend import NativeBackend
from memory_ops.native.library import MEMORY_LIBRARY
from tests.memory_ops.tables import KINDS, table_of

BUILD = MEMORY_LIBRARY.runnable_builds[0]


@pytest.fixture
def by_ctypes(monkeypatch):
    """The backend as it is without Python's headers, or with a torch that cannot exchange."""
    monkeypatch.setattr(backend, "_direct_calls", lambda: None)
    return NativeBackend(BUILD)


@pytest.fixture
def direct():
    return NativeBackend(BUILD)


def lookups(num_tokens=3, rows=9):
    """Rows and weights of two heads."""
    return torch.randint(0, rows, (num_tokens, 2, 4)), torch.randn(num_tokens, 2, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_both_ways_give_the_same_sums(kind, num_tokens, direct, by_ctypes):
    table = table_of(kind, torch.randn(9, 200))
    looked_up = lookups(num_tokens)
    assert torch.equal(
        direct.gather_rows(table, *looked_up), by_ctypes.gather_rows(table, *looked_up)
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_both_ways_choose_the_same_rows(num_tokens, direct, by_ctypes):
    scores = torch.randn(num_tokens, 2, 2, 30)
    for mine, theirs in zip(
        direct.product_topk(scores, 7), by_ctypes.product_topk(scores, 7), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_what_lies_otherwise_is_not_read_but_converted(direct):
    table, (rows, weights) = torch.randn(9, 40), lookups()
    expected = direct.gather_rows(table, rows, weights)
    apart = torch.stack((table, table), dim=1)[:, 0]
    assert torch.equal(direct.gather_rows(apart, rows, weights), expected)
    for turned in (rows.transpose(1, 2).contiguous().transpose(1, 2), rows):
        for other in (weights.double(), weights.transpose(1, 2).contiguous().transpose(1, 2)):
            assert torch.equal(direct.gather_rows(table, turned, other), expected)


def test_a_part_of_a_tensor_is_read_from_where_it_begins(direct):
    table, (rows, weights) = torch.randn(9, 40), lookups(6)
    expected = direct.gather_rows(table, rows, weights)[2:]
    assert torch.equal(direct.gather_rows(table, rows[2:], weights[2:]), expected)


@pytest.mark.parametrize(
    ("rows", "weights", "field"),
    [
        (torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8), "rows and weights"),
        (torch.zeros(3, 2, 4, dtype=torch.int64), torch.zeros(3, 2, 5), "rows and weights"),
        (torch.zeros(3, 2, 4, dtype=torch.int32), torch.zeros(3, 2, 4), "rows"),
        (
            torch.zeros(3, 2, 4, dtype=torch.int64),
            torch.zeros(3, 2, 4, dtype=torch.int32),
            "weights",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(rows, weights, field, direct):
    with pytest.raises(ValueError, match=f"^{field}:"):
        direct.gather_rows(torch.zeros(9, 40), rows, weights)


@pytest.mark.parametrize("wrong", [-1, 9, 2**62])
def test_a_row_outside_the_table_is_refused(wrong, direct):
    rows, weights = lookups()
    rows[1, 1, 2] = wrong
    with pytest.raises(IndexError, match=rf"rows: {wrong} is outside \[0, 9\)"):
        direct.gather_rows(torch.zeros(9, 40), rows, weights)


def test_scores_that_are_none_are_refused_by_name(direct):
    for scores, top_k in ((torch.zeros(1, 2, 3, 4), 2), (torch.zeros(1, 2, 2, 4), 5)):
        with pytest.raises(ValueError, match="^(half_scores|top_k):"):
            direct.product_topk(scores, top_k)


def test_the_functions_decline_what_is_no_tensor_here():
    address = ctypes.cast(MEMORY_LIBRARY.load(BUILD).memplus_gather_rows, ctypes.c_void_p).value
    for given in (torch.zeros(9, 40, device="meta"), [1.0], None):
        assert not direct_calls.gather_rows(address, None, given, *lookups(), torch.zeros(3, 40))
    with pytest.raises(TypeError, match="takes 6 arguments"):
        direct_calls.gather_rows(address)
