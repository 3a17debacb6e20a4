"""Matrix product with a weight in Hugging Face's layout."""

import torch
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``out = x @ weight.T + bias``, ``[T, O]`` in the dtype of ``x``."""
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)
