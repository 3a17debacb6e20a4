"""Endless, resumable order of passages: each epoch has every passage once, shuffled."""

import math
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

    No batch has more than ``num_tokens`` tokens, except a longer passage alone.

    Attributes:
        position: the next passage; set it to continue an equal order.
    """

    def __init__(self, passages: Sequence[Passage], num_tokens: int, seed: int) -> None:
        """Start at the first epoch.

        The rest of an epoch is always divided into the fewest batches of about equal length.
        """
        assert passages
        self._passages = passages
        self._num_tokens, self._seed = num_tokens, seed
        self.position = OrderPosition()
        self._start_epoch(0)

    @property
    def is_at_epoch_end(self) -> bool:
        """Whether the last batch was the last one of its epoch."""
        return self.position.done == 0

    def next(self) -> list[int]:
        """Indices of the next batch's passages."""
        epoch, done = self.position
        if epoch != self._epoch:
            self._start_epoch(epoch)
        left = sum(self._sizes[done:])
        even = left / math.ceil(left / self._num_tokens)
        first, size = done, 0
        while done < len(self._order):
            more = self._sizes[done]
            # half a passage more or less: the last batch of an epoch must not be a tiny one
            if size and (size + more / 2 >= even or size + more > self._num_tokens):
                break
            size += more
            done += 1
        is_end = done == len(self._order)
        self.position = OrderPosition(epoch + 1) if is_end else OrderPosition(epoch, done)
        return self._order[first:done]

    def _start_epoch(self, epoch: int) -> None:
        """Shuffle the passages; the order depends only on the seed and the epoch."""
        shuffled = np.random.default_rng((self._seed, epoch)).permutation(len(self._passages))
        self._epoch = epoch
        self._order = [int(index) for index in shuffled]
        self._sizes = [len(self._passages[index]) for index in self._order]
