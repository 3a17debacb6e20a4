"""Packed passages: tokens, targets, positions, and which targets have no loss."""

import numpy as np

from weights.training.packing import IGNORED_TARGET, Passage, cut, packed, packed_batches


def test_given_tokens_are_read_but_not_predicted():
    batch = packed([Passage((5, 6, 7, 8), num_given=2), Passage((1, 2))])
    assert batch.ids_T.tolist() == [5, 6, 7, 1]
    assert batch.targets_T.tolist() == [IGNORED_TARGET, 7, 8, 2]
    assert batch.positions_T.tolist() == [0, 1, 2, 0] and batch.starts == (0, 3, 4)
    assert batch.ids_T.dtype == batch.targets_T.dtype == batch.positions_T.dtype == np.int64


def test_every_token_but_the_first_is_predicted_once():
    for length in range(1, 12):
        passages = list(cut(range(length), 4))
        targets = [t for batch in packed_batches(passages, 5) for t in batch.targets_T.tolist()]
        assert targets == [*range(1, length)]
        assert all(len(passage) <= 4 for passage in passages)


def test_a_batch_closes_before_the_passage_that_exceeds_it():
    passages = [Passage((0,) * (length + 1)) for length in (3, 1, 1, 6, 2)]
    starts = [batch.starts for batch in packed_batches(passages, 4)]
    assert starts == [(0, 3, 4), (0, 1), (0, 6), (0, 2)]
