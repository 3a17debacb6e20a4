"""The gate kernel against its twin and fp64."""

from inspect import signature

import pytest
import torch

from engine.executors.cuda.kernels.silu_gate import silu_gate, silu_gate_reference
from tests.engine.executors.cuda.padded import (
    DTYPES,
    between_nans,
    check_close,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 100, 2048, 2500])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_halves_of_one_matrix(num_tokens, width, dtype):
    gate, x = between_nans(torch.randn(num_tokens, 2 * width).to(dtype)).chunk(2, dim=1)
    result = silu_gate(gate, x)
    assert result.dtype == dtype
    check_close(result, silu_gate_reference(gate.double(), x.double()), dtype)
    check_close(result, silu_gate_reference(gate, x), dtype)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_of_another_dtype_is_rounded_to_that_of_the_gate(dtype, x_dtype):
    gate, x = torch.randn(5, 100).to(dtype), torch.randn(5, 100).to(x_dtype)
    result = silu_gate(gate, x)
    assert torch.equal(result, silu_gate(gate, x.to(dtype)))
    check_close(result, silu_gate_reference(gate, x), dtype)


def test_large_gates_give_no_nan():
    gate, x = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]]), torch.ones(1, 5)
    assert torch.equal(silu_gate(gate, x), torch.tensor([[0.0, 0.0, 0.0, 90.0, 1e4]]))


def test_the_result_may_replace_an_operand():
    gate, x = torch.randn(5, 100), torch.randn(5, 100)
    wanted = silu_gate(gate, x)
    out = between_nans(x)
    assert silu_gate(gate, out, out) is out
    assert torch.equal(out, wanted)
    assert torch.equal(silu_gate(gate, x, gate), wanted)


def test_gate_and_twin_have_one_signature():
    assert signature(silu_gate) == signature(silu_gate_reference)


def test_the_gate_refuses_operands_that_do_not_match():
    gate = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="x: expected"):
        silu_gate(gate, torch.zeros(2, 9))
    with pytest.raises(ValueError, match="gate: expected"):
        silu_gate(torch.zeros(8, 2).t(), gate)
    with pytest.raises(ValueError, match="out: expected torch.float32"):
        silu_gate(gate, gate, gate.half())
