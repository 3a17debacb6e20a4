"""The routing kernels against their twin and the model's choice of experts."""

from inspect import signature

import pytest
import torch
from torch import Tensor

from engine.executors.cuda.kernels.routing import Routes, route, route_reference
from tests.engine.executors.cuda.padded import DTYPES, between_nans, check_close


def check(logits: Tensor, top_k: int) -> Routes:
    """Assert that pairs and bounds are those of the twin, and weights close; returns them."""
    routes, wanted = route(logits, top_k), route_reference(logits, top_k)
    assert torch.equal(routes.pairs_P, wanted.pairs_P)
    assert torch.equal(routes.bounds_E1, wanted.bounds_E1)
    torch.testing.assert_close(routes.weights_P, wanted.weights_P, equal_nan=True)
    return routes


@pytest.mark.parametrize("dtype", DTYPES)
# tokens of one program and of several; pairs of one block and of several
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 8, 2), (70, 17, 3), (520, 2, 2)]
)
def test_routes_are_those_of_the_twin(num_tokens, num_experts, top_k, dtype):
    check(between_nans(torch.randn(num_tokens, num_experts).to(dtype)), top_k)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 2), (3, 3)])
def test_a_token_may_choose_all_experts(num_experts, top_k):
    check(torch.randn(6, num_experts), top_k)


def test_the_twin_is_the_models_choice():
    # integers: no ties
    logits = torch.stack([torch.randperm(12) for _ in range(30)]).float() / 4
    best = logits.softmax(-1).topk(3)
    routes = check(logits, 3)
    share = best.values / best.values.sum(-1, keepdim=True)
    check_close(routes.weights_P, share.flatten(), torch.float32)
    experts = best.indices.flatten()[routes.pairs_P]
    for expert, (first, last) in enumerate(routes.bounds_E1.unfold(0, 2, 1).tolist()):
        assert (experts[first:last] == expert).all()
        assert (routes.pairs_P[first:last].diff() > 0).all()


def test_equal_logits_go_to_the_smaller_expert():
    logits = torch.zeros(3, 6)
    logits[1, 4] = 1
    logits[2, 0], logits[2, 1] = -0.0, -1
    routes = check(logits, 2)
    # expert 0: first choice of tokens 0 and 2, second choice of token 1; then 1, 2 and 4
    assert routes.pairs_P.tolist() == [0, 3, 4, 1, 5, 2]
    assert routes.bounds_E1.tolist() == [0, 3, 4, 5, 5, 6, 6]


def test_nan_and_infinities():
    logits = torch.randn(5, 6)
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    logits[4, 2:4] = torch.nan
    logits[4, 3] = -logits[4, 3]
    routes = check(logits, 2)
    assert routes.pairs_P.sort().values.tolist() == list(range(10))
    assert routes.weights_P.isnan().view(5, 2).all(1).tolist() == [False, True, True, False, True]


def test_route_and_twin_have_one_signature():
    assert signature(route) == signature(route_reference)
