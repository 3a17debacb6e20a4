"""Resumable endless order of passages: every epoch has each passage once, shuffled anew."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weights.training.packing import Passage


class OrderPosition(NamedTuple):
    """Position in an order: epoch, and passages done in it."""

    epoch: int = 0
    done: int = 0


class PassageOrder:
    """Batches of whole passages; a batch never spans two epochs.

    Attributes:
        position: the next passage; set it to continue an equal order.
    """

    def __init__(self, passages: Sequence[Passage], num_tokens: float, seed: int) -> None:
        """Start at the first epoch.

        An epoch is divided into batches of about equal length, of about ``num_tokens`` tokens.
        """
        assert passages
        self._passages = passages
        self._seed = seed
        total = sum(map(len, passages))
        self._batch_tokens = total / max(1, round(total / num_tokens))
        self.position = OrderPosition()
        self._epoch, self._order = 0, self._shuffled(0)

    @property
    def is_at_epoch_end(self) -> bool:
        """Whether the last batch was the last one of its epoch."""
        return self.position.done == 0

    def next(self) -> list[int]:
        """Indices of the next batch's passages."""
        epoch, done = self.position
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        batch: list[int] = []
        size = 0.0
        # half a passage more or less: the last batch of an epoch must not be a tiny one
        while done < len(self._order) and (
            not batch or size + self._size(done) / 2 < self._batch_tokens
        ):
            batch.append(self._order[done])
            size += self._size(done)
            done += 1
        self.position = OrderPosition(epoch, done)
        if done == len(self._order):
            self.position = OrderPosition(epoch + 1)
        return batch

    def _size(self, place: int) -> int:
        return len(self._passages[self._order[place]])

    def _shuffled(self, epoch: int) -> list[int]:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._passages))
        return [int(index) for index in order]
