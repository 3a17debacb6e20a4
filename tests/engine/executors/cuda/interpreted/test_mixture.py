"""The mixture of experts against its twin and fp64."""

from inspect import signature

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.executors.cuda.kernels.mixture import mixture, mixture_reference, route
from tests.engine.executors.cuda.padded import (
    DTYPES,
    between_nans,
    check_close,
)


def operands(
    num_tokens: int, num_experts: int, width: int, inner: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x between NaNs, router logits, and the two weights; results are of the order of 1."""
    x = between_nans(torch.randn(num_tokens, width).to(dtype))
    logits = torch.randn(num_tokens, num_experts)
    gate_up = torch.randn(num_experts, 2 * inner, width) / width**0.5
    down = torch.randn(num_experts, width, inner) / inner**0.5
    return x, logits.to(dtype), gate_up.to(dtype), down.to(dtype)


def check(tensors: tuple[Tensor, Tensor, Tensor, Tensor], top_k: int) -> None:
    x, logits, *weights = tensors
    result = mixture(*tensors, top_k)
    assert result.dtype == x.dtype and result.shape == x.shape
    # in fp64 but for the choice of experts
    exact = mixture_reference(x.double(), logits, *(w.double() for w in weights), top_k)
    check_close(result, exact, x.dtype)
    if x.dtype == torch.float32:
        # the twin rounds narrower dtypes more often
        check_close(result, mixture_reference(*tensors, top_k), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33])
def test_tokens_of_any_number(num_tokens, dtype):
    check(operands(num_tokens, 8, 40, 24, dtype), 2)


@pytest.mark.slow
@given(
    num_tokens=st.sampled_from([1, 5, 16, 70]),
    num_experts=st.sampled_from([1, 3, 12]),
    width=st.sampled_from([8, 100]),
    inner=st.sampled_from([1, 17, 96]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_shapes_of_any_kind(num_tokens, num_experts, width, inner, dtype, data):
    torch.manual_seed(20)
    top_k = data.draw(st.integers(1, min(num_experts, 4)))
    check(operands(num_tokens, num_experts, width, inner, dtype), top_k)


@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("num_tokens", [1, 40, 200])
@pytest.mark.parametrize("favourites", [1, 3, 8])
def test_tiles_cover_each_pair_once(favourites, num_tokens, block_m):
    # most tokens choose among a few experts
    logits = torch.randn(num_tokens, 8)
    logits[:, :favourites] += 9
    routes = route(logits, 2, block_m)
    ends, tiles = routes.pair_ends_E.tolist(), routes.tile_ends_E.tolist()
    chosen = logits.topk(2).indices.flatten()
    assert sorted(routes.pairs_P.tolist()) == list(range(2 * num_tokens))
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        pairs = routes.pairs_P[start:end]
        assert (chosen[pairs] == expert).all()
        assert pairs.tolist() == sorted(pairs.tolist())
        first = tiles[expert - 1] if expert else 0
        assert tiles[expert] - first == -(-len(pairs) // block_m)
    assert tiles[-1] <= routes.num_tiles


def test_experts_that_no_token_chose_are_not_read():
    x, logits, gate_up, down = operands(20, 6, 40, 24, torch.float32)
    logits[:, [0, 3, 5]] = -torch.inf
    wanted = mixture(x, logits, gate_up, down, 2)
    gate_up[[0, 3, 5]] = down[[0, 3, 5]] = torch.nan
    assert torch.equal(mixture(x, logits, gate_up, down, 2), wanted)
    assert wanted.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(dtype):
    x, logits, *weights = operands(6, 4, 100, 24, dtype)
    together = mixture(x, logits, *weights, 2)
    assert torch.equal(mixture(x, logits, *weights, 2), together)
    for token in range(6):
        one = slice(token, token + 1)
        assert torch.equal(mixture(x[one], logits[one], *weights, 2), together[one])


def test_no_value_is_read_on_the_host(monkeypatch):
    tensors = operands(5, 4, 40, 24, torch.float32)
    # the interpreter reads values, so the launch is left out
    monkeypatch.setattr("engine.executors.cuda.kernels.mixture._multiply", lambda *_, **__: None)

    def refuse(*_):
        raise AssertionError("a host sync")

    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse)
    assert mixture(*tensors, 2).shape == (5, 40)


def test_mixture_and_twin_have_one_signature():
    assert signature(mixture) == signature(mixture_reference)


def test_the_mixture_refuses_operands_that_do_not_match():
    x, logits, gate_up, down = operands(3, 4, 40, 24, torch.float32)
    refused = [
        ("x: expected", (x[0], logits, gate_up, down, 2)),
        ("logits: expected", (x, logits[:, 1:], gate_up, down, 2)),
        ("gate_up: expected", (x, logits, gate_up[:, 1:], down, 2)),
        ("down: expected", (x, logits, gate_up, down[:, 1:], 2)),
        ("gate_up: expected contiguous", (x, logits, gate_up.half(), down, 2)),
        ("down: expected contiguous", (x, logits, gate_up, down.transpose(1, 2).mT.half(), 2)),
        ("top_k: 5 is outside", (x, logits, gate_up, down, 5)),
        ("top_k: 0 is outside", (x, logits, gate_up, down, 0)),
    ]
    for message, arguments in refused:
        with pytest.raises(ValueError, match=message):
            mixture(*arguments)
