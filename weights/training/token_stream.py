"""Batches of exactly so many tokens from shuffled documents, from any place on again."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weights.errors import DataError
from weights.training.token_file import TokenFile


class StreamPlace(NamedTuple):
    """Where a stream stands: pieces done in this epoch, and tokens done of the next one."""

    epoch: int = 0
    piece: int = 0
    offset: int = 0


@dataclass(frozen=True)
class PackedTokens:
    """Sequences one after another, without padding.

    Attributes:
        ids_T: int64 token ids.
        targets_T: int64, the token that follows each.
        positions_T: int64, each token's place in its sequence.
        starts: S + 1 offsets of the sequences.
    """

    ids_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    starts: tuple[int, ...]

    def part(self, rank: int, count: int) -> "PackedTokens":
        """Of ``count`` parts that are about as long the one at ``rank``: whole sequences."""
        starts = np.asarray(self.starts)
        bounds = np.searchsorted(starts, np.arange(count + 1) * starts[-1] / count)
        own = starts[bounds[rank] : bounds[rank + 1] + 1]
        tokens = slice(own[0], own[-1])
        return PackedTokens(
            self.ids_T[tokens],
            self.targets_T[tokens],
            self.positions_T[tokens],
            tuple(int(start - own[0]) for start in own),
        )


class TokenStream:
    """Endless batches; each epoch has every document once, in an order of its own.

    Attention spans no two documents. One longer than ``sequence_length`` is cut into pieces, which
    are shuffled like documents; the last piece of a batch is cut where the batch is full, and goes
    on, as a sequence of its own, in the next.
    """

    def __init__(self, tokens: TokenFile, sequence_length: int, seed: int) -> None:
        """Begin with the first epoch.

        Raises:
            DataError: no document has a token that follows another.
        """
        self._ids = tokens.ids
        self._seed = seed
        self._starts, self._lengths = _pieces(tokens.starts, sequence_length)
        if not len(self._starts):
            raise DataError("train: no document has two tokens")
        self.place = StreamPlace()
        self._order = self._shuffled(0)

    @property
    def mean_attended(self) -> float:
        """Tokens that one sees, itself and those before, on average."""
        lengths = self._lengths.astype(np.float64)
        return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())

    def seek(self, place: StreamPlace) -> None:
        """Go to a place that this stream, or its twin, once had."""
        if place.epoch != self.place.epoch:
            self._order = self._shuffled(place.epoch)
        self.place = place

    def next(self, num_tokens: int) -> PackedTokens:
        """The next ``num_tokens`` tokens, with what follows each."""
        ids = np.empty(num_tokens, dtype=np.int64)
        targets, positions = np.empty_like(ids), np.empty_like(ids)
        starts, done = [0], 0
        while done < num_tokens:
            _, piece, offset = self.place
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

    def _advance(self, is_through: bool, count: int) -> None:
        epoch, piece, offset = self.place
        if not is_through:
            self.place = StreamPlace(epoch, piece, offset + count)
        elif piece + 1 < len(self._order):
            self.place = StreamPlace(epoch, piece + 1, 0)
        else:
            self.place = StreamPlace(epoch + 1, 0, 0)
            self._order = self._shuffled(epoch + 1)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._starts))


def _pieces(
    starts: NDArray[np.int64], sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each piece begins, and how many of its tokens have one that follows."""
    lengths = np.maximum(np.diff(starts) - 1, 0)
    counts = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begun = number * sequence_length
    return starts[document] + begun, np.minimum(lengths[document] - begun, sequence_length)
