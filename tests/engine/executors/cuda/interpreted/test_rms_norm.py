"""The norm kernel against its twin and fp64."""

from inspect import signature

import pytest
import torch

from engine.executors.cuda.kernels.rms_norm import rms_norm, rms_norm_reference
from engine.model.norm import rms_norm as model_rms_norm
from tests.engine.executors.cuda.padded import (
    DTYPES,
    between_nans,
    check_close,
)

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 100, 576, 4100])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_rows_are_normed(num_tokens, width, dtype):
    x = between_nans(torch.randn(num_tokens, width).to(dtype) * 3)
    weight = torch.rand(width).to(dtype) + 0.5
    result = rms_norm(x, weight, EPS)
    assert result.dtype == dtype and result.is_contiguous()
    check_close(result, model_rms_norm(x.double(), weight.double(), EPS), dtype)
    check_close(result, rms_norm_reference(x, weight, EPS), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_halves_of_queries_have_their_own_weights(num_tokens, dtype):
    queries = between_nans(torch.randn(num_tokens, 3, 2, 20).to(dtype))
    weight = torch.rand(2, 20).to(dtype) + 0.5
    result = rms_norm(queries, weight, EPS)
    assert result.shape == queries.shape
    check_close(result, model_rms_norm(queries.double(), weight.double(), EPS), dtype)


def test_a_wider_weight_is_not_rounded_first():
    x, weight = torch.randn(3, 100).bfloat16(), torch.rand(100)
    check_close(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS), torch.bfloat16)


def test_norm_and_twin_have_one_signature():
    assert signature(rms_norm) == signature(rms_norm_reference)


def test_the_norm_refuses_operands_that_do_not_match():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    refused = [
        ("weight: expected", x, torch.zeros(7)),
        ("weight: two dimensions", x, torch.zeros(2, 8)),
        ("weight: expected contiguous", x, torch.zeros(16)[::2]),
        ("x: expected contiguous", torch.zeros(8, 2).t(), weight),
    ]
    for message, *operands in refused:
        with pytest.raises(ValueError, match=message):
            rms_norm(*operands, EPS)
