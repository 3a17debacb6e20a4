"""Resumable stream of batches with an exact number of tokens from shuffled documents."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weights.training.token_file import TokenFile


class StreamPosition(NamedTuple):
    """Position of a stream: epoch, pieces done in it, and tokens done of the current piece."""

    epoch: int = 0
    piece: int = 0
    offset: int = 0


@dataclass(frozen=True)
class PackedTokens:
    """Concatenated sequences without padding.

    Attributes:
        ids_T: int64 token ids.
        targets_T: int64 id of the token that follows each.
        positions_T: int64 position of each token in its sequence.
        starts: offsets of the S sequences, and the total length.
    """

    ids_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    starts: tuple[int, ...]

    def part(self, rank: int, count: int) -> "PackedTokens":
        """Part ``rank`` of ``count`` parts of about equal length; sequences are not split."""
        starts = np.asarray(self.starts)
        bounds = np.searchsorted(starts, np.arange(count + 1) * starts[-1] / count)
        offsets = starts[bounds[rank] : bounds[rank + 1] + 1]
        tokens = slice(offsets[0], offsets[-1])
        return PackedTokens(
            self.ids_T[tokens],
            self.targets_T[tokens],
            self.positions_T[tokens],
            tuple(int(start - offsets[0]) for start in offsets),
        )


class TokenStream:
    """Endless batches; each epoch has every document once, in a new order.

    Attention never spans two documents. Documents longer than ``sequence_length`` are cut into
    pieces, which are shuffled like documents. If the last piece of a batch does not fit, its rest
    starts the next batch as a separate sequence.
    """

    def __init__(self, tokens: TokenFile, sequence_length: int, seed: int) -> None:
        """Start at the first epoch; ``tokens`` have passed ``check_pairs``."""
        self._ids = tokens.ids
        self._seed = seed
        self._starts, self._lengths = _pieces(tokens.starts, sequence_length)
        assert len(self._starts), "no document has two tokens"
        self.position = StreamPosition()
        self._order = self._shuffled(0)

    @property
    def mean_attended(self) -> float:
        """Mean number of tokens that a token attends to, including itself."""
        lengths = self._lengths.astype(np.float64)
        return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())

    def seek(self, position: StreamPosition) -> None:
        """Continue from the position of an equal stream."""
        if position.epoch != self.position.epoch:
            self._order = self._shuffled(position.epoch)
        self.position = position

    def next(self, num_tokens: int) -> PackedTokens:
        """The next ``num_tokens`` tokens, with their targets."""
        ids = np.empty(num_tokens, dtype=np.int64)
        targets, positions = np.empty_like(ids), np.empty_like(ids)
        starts, done = [0], 0
        while done < num_tokens:
            _, piece, offset = self.position
            index = self._order[piece]
            first = self._starts[index] + offset
            count = int(min(self._lengths[index] - offset, num_tokens - done))
            sequence = self._ids[first : first + count + 1].astype(np.int64)
            ids[done : done + count] = sequence[:-1]
            targets[done : done + count] = sequence[1:]
            positions[done : done + count] = np.arange(count)
            done += count
            starts.append(done)
            self._advance(offset + count == self._lengths[index], count)
        return PackedTokens(ids, targets, positions, tuple(starts))

    def _advance(self, is_finished: bool, count: int) -> None:
        epoch, piece, offset = self.position
        if not is_finished:
            self.position = StreamPosition(epoch, piece, offset + count)
        elif piece + 1 < len(self._order):
            self.position = StreamPosition(epoch, piece + 1, 0)
        else:
            self.position = StreamPosition(epoch + 1, 0, 0)
            self._order = self._shuffled(epoch + 1)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._starts))


def _pieces(
    starts: NDArray[np.int64], sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offset of each piece, and its number of tokens that have a next token."""
    lengths = np.maximum(np.diff(starts) - 1, 0)
    counts = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    skipped = number * sequence_length
    return starts[document] + skipped, np.minimum(lengths[document] - skipped, sequence_length)
