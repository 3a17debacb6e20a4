"""The embedding kernel against its twin."""

from inspect import signature

import pytest
import torch

from engine.executors.cuda.kernels.embed import embed, embed_reference
from memory_ops.anonymous import anonymous_zeros
from tests.engine.executors.cuda.group_cases import FORMATS, random_groups
from tests.engine.executors.cuda.padded import DTYPES, between_nans


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 100, 2048, 2500])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_rows_of_known_and_pending_tokens(num_tokens, width, dtype):
    embedding = between_nans(torch.randn(20, width).to(dtype))
    last_token = torch.randint(0, 20, (6,))
    ids = torch.randint(-6, 20, (num_tokens,))
    result = embed(ids, last_token, embedding)
    assert result.dtype == dtype
    assert torch.equal(result, embed_reference(ids, last_token, embedding))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one", FORMATS, ids=str)
@pytest.mark.parametrize("width", [1, 100, 2500])
def test_rows_in_groups(width, one, dtype):
    embedding = random_groups(one, 20, width)
    last_token, ids = torch.randint(0, 20, (6,)), torch.randint(-6, 20, (7,))
    found, wanted = torch.full((2, 7, width), torch.nan, dtype=dtype)
    assert embed(ids, last_token, embedding, found) is found
    assert torch.equal(found, embed_reference(ids, last_token, embedding, wanted))


def test_pending_tokens_are_those_of_their_seats():
    embedding = torch.arange(40.0).view(10, 4)
    result = embed(torch.tensor([3, -1, -3, 0]), torch.tensor([7, 8, 9]), embedding)
    assert torch.equal(result, embedding[[3, 7, 9, 0]])


def test_seats_are_read_for_pending_tokens_only():
    nowhere = torch.empty(0, dtype=torch.int64)
    embedding = torch.randn(4, 8)
    assert torch.equal(embed(torch.tensor([2]), nowhere, embedding), embedding[2:3])


def test_offsets_pass_2_to_the_31():
    embedding = anonymous_zeros((2**21 + 2, 1024), torch.bfloat16)
    embedding[-1] = torch.randn(1024)
    ids, last_token = torch.tensor([2**21 + 1, -1]), torch.tensor([2**21 + 1])
    assert torch.equal(embed(ids, last_token, embedding), embedding[-1:].expand(2, -1))


def test_embed_and_twin_have_one_signature():
    assert signature(embed) == signature(embed_reference)


def test_embed_refuses_operands_that_do_not_match():
    ids, embedding = torch.zeros(2, dtype=torch.int64), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="ids: expected a contiguous int64"):
        embed(ids.int(), ids, embedding)
    with pytest.raises(ValueError, match="last_token: expected a contiguous int64"):
        embed(ids, ids[None], embedding)
    with pytest.raises(ValueError, match="embedding: expected"):
        embed(ids, ids, embedding.t())
    for out in (
        torch.zeros(2, 9),
        torch.zeros(2, 8).half(),
        torch.zeros(3, 8),
        torch.zeros(8, 2).t(),
    ):
        with pytest.raises(ValueError, match="out: expected"):
            embed(ids, ids, embedding, out)
    groups = random_groups(FORMATS[0], 4, 8)
    with pytest.raises(ValueError, match="out: required for"):
        embed(ids, ids, groups)
    with pytest.raises(ValueError, match="embedding: expected"):
        embed(ids, ids, groups, torch.zeros(2, 33))
