"""Chooses the rows that may change: those that facts read more often than background text does.

The score is the TF-IDF of "Continual Learning via Sparse Memory Finetuning" (arXiv 2510.15103).
"""

import torch
from torch import Tensor

from weights.learning.learning_config import RowConfig
from weights.training.row_reads import RowReads, TableReads


def chosen_rows(
    facts: RowReads, background: RowReads | None, config: RowConfig
) -> dict[str, Tensor]:
    """The rows of each table that may change, int64 and ascending.

    The rank ``all`` chooses every row. Other ranks choose at most ``config.most_rows`` rows of a
    table, all of them read by facts. Only the rank ``tfidf`` needs ``background``.
    """
    chosen = {}
    for name, reads in facts.tables.items():
        if config.rank == "all":
            chosen[name] = torch.arange(len(reads.reads_R))
            continue
        if config.rank == "reads":
            scores_R = reads.reads_R.double()
        else:
            assert background is not None
            scores_R = tf_idf(reads.reads_R, background.tables[name], background.num_documents)
        chosen[name] = best_rows(scores_R, config.most_rows)
    return chosen


def tf_idf(fact_reads_R: Tensor, background: TableReads, num_documents: int) -> Tensor:
    """Scores of all rows, fp64 ``[R]``; rows that the facts do not read have 0.

    score[r] = reads[r] / sum of reads * log((documents + 1) / (documents that read r + 1))
    """
    share_R = fact_reads_R.double() / max(int(fact_reads_R.sum()), 1)
    return share_R * ((num_documents + 1) / (background.documents_R.double() + 1)).log()


def best_rows(scores_R: Tensor, count: int) -> Tensor:
    """Ids of the ``count`` rows with the largest positive scores, int64, ascending.

    Of equal scores the smaller id is taken; fewer rows are returned if fewer have a score.
    """
    order_R = torch.sort(scores_R, descending=True, stable=True).indices[:count]
    return order_R[scores_R[order_R] > 0].sort().values
