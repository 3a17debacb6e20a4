"""Log-probabilities of tokens by the softmax of their rows of logits, and of the likeliest ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ops.native.library import native_ops
from engine.ops.scores import Scores


def log_probabilities(
    logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_best: int
) -> Scores:
    """Score one token of each of P rows.

    Args:
        logits_LV: ``[L, vocabulary]``, any floating dtype.
        rows: which rows.
        token_ids: for each of them the token whose own log-probability is wanted.
        num_best: how many of the likeliest tokens are wanted too, at most the vocabulary.
    """
    native = native_ops(logits_LV.device, logits_LV.dtype)
    if native is not None:
        return native.log_probabilities(logits_LV, rows, token_ids, num_best)
    return log_probabilities_by_torch(logits_LV, rows, token_ids, num_best)


def log_probabilities_by_torch(
    logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_best: int
) -> Scores:
    """``log_probabilities`` on any device."""
    at_P, ids_P = torch.tensor([rows, token_ids], device=logits_LV.device)
    scores_PV = logits_LV.index_select(0, at_P).float()
    total_P1 = scores_PV.logsumexp(dim=-1, keepdim=True)
    own_P1 = scores_PV.gather(1, ids_P.unsqueeze(1))
    ranks_P = (scores_PV > own_P1).sum(dim=-1) + 1
    best = scores_PV.topk(num_best, dim=-1)
    return Scores((own_P1 - total_P1).squeeze(1), ranks_P, best.indices, best.values - total_P1)
