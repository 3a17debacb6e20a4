"""The order of rotary lanes in the rows of query and key weights."""

from torch import Tensor


def pair_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder rotary lanes: others pair neighbours, this model pairs halves.

    ``weight`` is ``[num_heads * head_dim, ...]``; returns the same shape.
    """
    rest = weight.shape[1:]
    return weight.view(num_heads, -1, 2, *rest).transpose(1, 2).reshape(weight.shape)


def pair_neighbours(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of ``pair_halves``."""
    rest = weight.shape[1:]
    return weight.view(num_heads, 2, -1, *rest).transpose(1, 2).reshape(weight.shape)
