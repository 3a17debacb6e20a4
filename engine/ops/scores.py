"""What is told of rows of logits: how likely a token is, and which are the likeliest."""

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Log-probabilities at P rows.

    Attributes:
        own_P: of a given token each, fp32.
        ranks_P: 1 where no token is likelier than it, int64.
        best_ids_PK: the K likeliest tokens, int64.
        best_PK: their log-probabilities in descending order, fp32.
    """

    own_P: Tensor
    ranks_P: Tensor
    best_ids_PK: Tensor
    best_PK: Tensor
