"""Ranks of rows: by TF-IDF, by reads alone, or every row."""

import math

import torch

from weights.learning.learning_config import RowConfig
from weights.learning.row_ranks import best_rows, chosen_rows, tf_idf
from weights.training.row_reads import RowReads, TableReads

FACTS = torch.tensor([4, 0, 2, 2, 2])
BACKGROUND = TableReads(torch.zeros(5).long(), torch.tensor([9, 0, 0, 4, 9]))


def test_scores_are_tf_idf():
    scores = tf_idf(FACTS, BACKGROUND, 9).tolist()
    wanted = [0.0, 0.0, 0.2 * math.log(10), 0.2 * math.log(2), 0.0]
    assert all(math.isclose(a, b) for a, b in zip(scores, wanted, strict=True))


def test_the_best_rows_have_positive_scores_and_ascend():
    scores = torch.tensor([0.5, 0.0, 2.0, 0.5, -1.0]).double()
    assert best_rows(scores, 2).tolist() == [0, 2]
    assert best_rows(scores, 9).tolist() == [0, 2, 3]


def test_a_rank_chooses_rows_of_each_table():
    facts = RowReads({"t": TableReads(FACTS, FACTS)}, 1)
    background = RowReads({"t": BACKGROUND}, 9)

    def chosen(**config):
        needed = background if config.get("rank", "tfidf") == "tfidf" else None
        return chosen_rows(facts, needed, RowConfig(**config))["t"].tolist()

    assert chosen() == [2, 3]
    assert chosen(rows=1) == [2]
    assert chosen(rank="reads") == [0, 2, 3, 4]
    assert chosen(rank="reads", rows=1) == [0]
    assert chosen(rank="all") == [0, 1, 2, 3, 4]
