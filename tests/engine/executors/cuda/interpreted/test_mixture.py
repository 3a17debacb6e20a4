"""The mixture of experts against its twin and fp64."""

from inspect import signature

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from engine.executors.cuda.kernels.mixture import mixture, mixture_reference
from engine.model.grouped_weights import WeightGroups, dense_weights
from tests.engine.executors.cuda.group_cases import FORMATS, rounded
from tests.engine.executors.cuda.padded import (
    DTYPES,
    FEW_DTYPES,
    between_nans,
    check_close,
)

pytestmark = pytest.mark.slow


def operands(
    num_tokens: int, num_experts: int, width: int, inner: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Residual and x between NaNs, router logits, the two weights; results are of the order of 1.

    The logits have no ties, for which experts are open.
    """
    residual = between_nans(torch.randn(num_tokens, width).to(dtype))
    x = between_nans(torch.randn(num_tokens, width).to(dtype))
    logits = torch.randn(num_tokens, num_experts)
    gate_up = torch.randn(num_experts, 2 * inner, width) / width**0.5
    down = torch.randn(num_experts, width, inner) / inner**0.5
    return residual, x, logits, gate_up.to(dtype), down.to(dtype)


def added(residual: Tensor, *tensors: Tensor, top_k: int) -> Tensor:
    """The result of ``mixture``, without a change of the residual."""
    residual = between_nans(residual)
    assert mixture(residual, *tensors, top_k) is residual
    return residual


def check(tensors: tuple[Tensor, ...], top_k: int) -> None:
    residual, x, logits, *weights = tensors
    result = added(*tensors, top_k=top_k)
    # in fp64 but for the choice of experts
    wide = [weight.double() for weight in weights]
    check_close(
        result, mixture_reference(residual.double(), x.double(), logits, *wide, top_k), x.dtype
    )
    if x.dtype == torch.float32:
        # the twin rounds narrower dtypes more often
        twin = mixture_reference(residual.clone(), x, logits, *weights, top_k)
        check_close(result, twin, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33])
def test_tokens_of_any_number(num_tokens, dtype):
    check(operands(num_tokens, 8, 40, 24, dtype), 2)


@pytest.mark.parametrize("dtype", FEW_DTYPES)
@pytest.mark.parametrize("one", FORMATS, ids=str)
def test_experts_in_groups(one, dtype):
    residual, x, logits, *weights = operands(7, 4, 100, 24, dtype)
    grouped, dense = [], []
    for weight in weights:
        experts = [rounded(one, expert.float()) for expert in weight]
        arrays = zip(*(expert.tensors.values() for expert in experts), strict=True)
        values, scales, *minimums = map(torch.stack, arrays)
        grouped.append(WeightGroups(values, scales, one.bits, *minimums))
        dense.append(
            torch.stack([dense_weights(expert, weight.shape[2], dtype) for expert in experts])
        )
    found = added(residual, x, logits, *grouped, top_k=2)
    check_close(found, added(residual, x, logits, *dense, top_k=2).double(), dtype)
    twin = mixture_reference(residual.clone(), x, logits, *grouped, 2)
    assert torch.equal(twin, mixture_reference(residual.clone(), x, logits, *dense, 2))


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


def test_most_tokens_choose_one_expert():
    tensors = operands(150, 8, 16, 8, torch.float32)
    tensors[2][:, 3] += 9
    # several tiles of the largest number of pairs
    check(tensors, 2)


def test_experts_that_no_token_chose_are_not_read():
    residual, x, logits, gate_up, down = operands(20, 6, 40, 24, torch.float32)
    logits[:, [0, 3, 5]] = -torch.inf
    wanted = added(residual, x, logits, gate_up, down, top_k=2)
    gate_up[[0, 3, 5]] = down[[0, 3, 5]] = torch.nan
    assert torch.equal(added(residual, x, logits, gate_up, down, top_k=2), wanted)
    assert wanted.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_token_does_not_depend_on_the_others(dtype):
    residual, x, logits, *weights = operands(3, 4, 100, 24, dtype)
    together = added(residual, x, logits, *weights, top_k=2)
    assert torch.equal(added(residual, x, logits, *weights, top_k=2), together)
    for token in range(3):
        one = slice(token, token + 1)
        apart = added(residual[one], x[one], logits[one], *weights, top_k=2)
        assert torch.equal(apart, together[one])


def test_no_value_is_read_on_the_host(monkeypatch):
    tensors = operands(5, 4, 40, 24, torch.float32)
    # the interpreter reads values, so launches are left out
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)

    def refuse(*_):
        raise AssertionError("a host sync")

    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse)
    assert mixture(*tensors, 2).shape == (5, 40)


def test_mixture_and_twin_have_one_signature():
    assert signature(mixture) == signature(mixture_reference)


def test_the_mixture_refuses_operands_that_do_not_match():
    names = "residual", "x", "logits", "gate_up", "down"
    right = dict(zip(names, operands(3, 4, 40, 24, torch.float32), strict=True)) | {"top_k": 2}
    down = right["down"]
    refused = [
        ("x: expected", {"x": right["x"][0]}),
        ("residual: expected", {"residual": right["residual"][:, :-1]}),
        ("residual: expected torch.float32", {"residual": right["residual"].half()}),
        ("logits: expected", {"logits": right["logits"][:, 1:]}),
        ("logits: expected a matrix, rows", {"logits": torch.zeros(4, 3).t()}),
        ("gate_up: expected", {"gate_up": right["gate_up"][:, 1:]}),
        ("down: expected", {"down": down[:, 1:]}),
        ("gate_up: expected contiguous", {"gate_up": right["gate_up"].half()}),
        ("down: expected contiguous", {"down": down.transpose(1, 2).mT.half()}),
        ("top_k: 5 is outside", {"top_k": 5}),
        ("top_k: 0 is outside", {"top_k": 0}),
    ]
    for message, changed in refused:
        with pytest.raises(ValueError, match=message):
            mixture(*(right | changed).values())
