"""Packs token sequences into batches without padding, with a loss on chosen tokens only."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weights.training.token_stream import PackedTokens

# torch's cross entropy skips targets with this value
IGNORED_TARGET = -100


@dataclass(frozen=True)
class Passage:
    """A token sequence whose first tokens are given: they are read, but have no loss.

    Attributes:
        ids: at least two token ids.
        num_given: tokens at the front without a loss, from 1 to ``len(ids) - 1``.
    """

    ids: tuple[int, ...]
    num_given: int = 1

    def __len__(self) -> int:
        """Tokens that a model reads: all but the last, which is only predicted."""
        return len(self.ids) - 1


def cut(ids: Sequence[int], max_positions: int) -> Iterator[Passage]:
    """A document as passages of at most ``max_positions`` tokens read; none if it has one token.

    Every token but the first is predicted once.
    """
    for first in range(0, len(ids) - 1, max_positions):
        yield Passage(tuple(ids[first : first + max_positions + 1]))


def packed(passages: Sequence[Passage]) -> PackedTokens:
    """One batch with these passages in order."""
    lengths = [len(passage) for passage in passages]
    targets = [np.array(passage.ids[1:], dtype=np.int64) for passage in passages]
    for passage, targets_T in zip(passages, targets, strict=True):
        targets_T[: passage.num_given - 1] = IGNORED_TARGET
    return PackedTokens(
        ids_T=np.concatenate([np.array(one.ids[:-1], dtype=np.int64) for one in passages]),
        targets_T=np.concatenate(targets),
        positions_T=np.concatenate([np.arange(length) for length in lengths]),
        starts=(0, *np.cumsum(lengths).tolist()),
    )


def packed_batches(passages: Iterable[Passage], num_tokens: int) -> Iterator[PackedTokens]:
    """Batches of whole passages in order, of at most ``num_tokens`` tokens.

    A batch that holds a longer passage holds no other.
    """
    batch: list[Passage] = []
    size = 0
    for passage in passages:
        if batch and size + len(passage) > num_tokens:
            yield packed(batch)
            batch, size = [], 0
        batch.append(passage)
        size += len(passage)
    if batch:
        yield packed(batch)
