"""Inputs of kernel tests: matrices between NaNs, and comparison under the tolerance table."""

import pytest
import torch
from torch import Tensor

from tests.conftest import TOLERANCE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# fp16 and bf16 only among the slow tests
FEW_DTYPES = (DTYPES[0], *(pytest.param(one, marks=pytest.mark.slow) for one in DTYPES[1:]))


def between_nans(matrix: Tensor) -> Tensor:
    """The same values, with NaN before and after each row of the first dimension."""
    rows = matrix.flatten(1)
    wide = torch.full((len(rows), rows.shape[1] + 32), torch.nan, dtype=matrix.dtype)
    wide[:, 16:-16] = rows
    return wide[:, 16:-16].unflatten(1, matrix.shape[1:]) if matrix.dim() > 2 else wide[:, 16:-16]


def check_close(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Assert that a result agrees with an exact one, within the tolerance of ``dtype``."""
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(result.double(), exact.double(), rtol=rtol, atol=atol)
