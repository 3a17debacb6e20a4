"""Log-probabilities in plain torch: a token's own and the top k, from rows of logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """Log-probabilities at P rows.

    Attributes:
        own_P: fp32 log-probabilities of the given tokens.
        ranks_P: int64 ranks of the given tokens, 1 for the likeliest.
        best_ids_PK: int64 ids of the K likeliest tokens.
        best_PK: fp32 log-probabilities of these, in descending order.
    """

    own_P: Tensor
    ranks_P: Tensor
    best_ids_PK: Tensor
    best_PK: Tensor


def score(
    logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_best: int
) -> Scores:
    """Log-probabilities of one token at each of P rows of logits, by the softmax of that row.

    ``logits_LV`` has any floating dtype, on any device; ``num_best`` is K, at most the vocabulary.
    """
    rows_P, token_ids_P = torch.tensor([rows, token_ids], device=logits_LV.device)
    return score_tokens(logits_LV, rows_P, token_ids_P, num_best)


def score_tokens(logits_LV: Tensor, rows_P: Tensor, token_ids_P: Tensor, num_best: int) -> Scores:
    """Like ``score``, by int64 rows and ids that only the device knows; never waits for it."""
    scores_PV = logits_LV.index_select(0, rows_P).float()
    total_P1 = scores_PV.logsumexp(dim=-1, keepdim=True)
    own_P1 = scores_PV.gather(1, token_ids_P.unsqueeze(1))
    ranks_P = (scores_PV > own_P1).sum(dim=-1) + 1
    best = scores_PV.topk(num_best, dim=-1)
    return Scores((own_P1 - total_P1).squeeze(1), ranks_P, best.indices, best.values - total_P1)
