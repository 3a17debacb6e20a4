"""Folds a batch norm and score scales into the weights of a memory layer's queries.

F is H * k: the width of all heads' queries.
"""

from typing import NamedTuple

from torch import Tensor

BATCH_NORM_EPS = 1e-5


class BatchNorm(NamedTuple):
    """Parameters and statistics of a batch norm, each ``[F]``."""

    weight_F: Tensor
    bias_F: Tensor
    mean_F: Tensor
    variance_F: Tensor


def folded_query(
    weight_FD: Tensor, bias_F: Tensor, norm: BatchNorm | None, log_scale_H: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of queries that include a batch norm and the heads' score scales.

    Scores are linear in the query, so a head's factor of all scores is one of its query. The factor
    is positive: the order of the scores stays.

    Args:
        norm: applied to the queries as in evaluation; None if they have none.
        log_scale_H: logarithms of the factors; None if there are none.

    Returns:
        ``weight_FD`` and ``bias_F`` in fp64.
    """
    weight_FD, bias_F = weight_FD.double(), bias_F.double()
    if norm is not None:
        factor_F = norm.weight_F.double() / (norm.variance_F.double() + BATCH_NORM_EPS).sqrt()
        weight_FD = weight_FD * factor_F[:, None]
        bias_F = (bias_F - norm.mean_F.double()) * factor_F + norm.bias_F.double()
    if log_scale_H is not None:
        scale_F = log_scale_H.double().exp().repeat_interleave(len(bias_F) // len(log_scale_H))
        weight_FD, bias_F = weight_FD * scale_F[:, None], bias_F * scale_F
    return weight_FD, bias_F
