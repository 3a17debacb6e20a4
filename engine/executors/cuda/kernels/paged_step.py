"""Device tensors that place a step's tokens in their sequences, and the tiles of its queries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

# queries of one sequence that a program of the attention kernel computes together
QUERY_TILE = 32
# rows of a program that attends to a part of a context: queries, each with the heads of a group
_SPLIT_ROWS = 64
_MOST_SPLIT_QUERIES = 16


@dataclass(frozen=True)
class PagedStep:
    """The sequences of one step, in tensors on the device whose sizes the step's bucket fixes.

    Sequence s has the rows ``[query_starts[s], query_starts[s + 1])`` of the step's tokens, which
    are its last ones. Padding is a sequence without rows, or one that repeats another sequence's
    seat and length with a row that nobody reads.

    Attributes:
        query_starts_S1: int64 ``[S + 1]``.
        context_lengths_S: int64, each sequence's number of tokens, with those of this step.
        seats_S: int64, each sequence's row of the block table.
        block_table_PB: int32 ``[seats, most blocks of a sequence]``, the ids of each sequence's KV
            blocks in order, then arbitrary values.
        tiles_I2: int64 ``[I, 2]`` from ``query_tiles``, the tiles of the sequences with more than
            ``split_queries`` tokens in the step; None if every sequence has at most one token.
    """

    query_starts_S1: Tensor
    context_lengths_S: Tensor
    seats_S: Tensor
    block_table_PB: Tensor
    tiles_I2: Tensor | None = None


def split_queries(group: int) -> int:
    """The most queries of a sequence whose context is split, a power of 2.

    The context of a sequence with more queries is not split; its queries are, into tiles.

    Args:
        group: query heads per KV head.
    """
    padded_group = 1 << (group - 1).bit_length()
    return max(1, min(_SPLIT_ROWS // padded_group, _MOST_SPLIT_QUERIES))


def query_tiles(query_counts: Sequence[int], group: int, num_tiles: int) -> npt.NDArray[np.int64]:
    """The tiles ``[num_tiles, 2]`` of sequences with more than ``split_queries(group)`` queries.

    A tile is (sequence, first of its queries in the tile), and has up to ``QUERY_TILE`` queries.
    Unused entries are (-1, 0).

    Raises:
        ValueError: there are more than ``num_tiles`` tiles.
    """
    most = split_queries(group)
    tiles = [
        (sequence, first)
        for sequence, count in enumerate(query_counts)
        if count > most
        for first in range(0, count, QUERY_TILE)
    ]
    if len(tiles) > num_tiles:
        raise ValueError(f"num_tiles: {num_tiles} is less than the {len(tiles)} tiles of the step")
    tiles_I2 = np.zeros((num_tiles, 2), dtype=np.int64)
    tiles_I2[:, 0] = -1
    if tiles:
        tiles_I2[: len(tiles)] = tiles
    return tiles_I2


def most_query_tiles(num_tokens: int, num_sequences: int) -> int:
    """An upper limit of the tiles of ``num_tokens`` tokens in ``num_sequences`` sequences, for any
    number of heads.

    ``c > 1`` tokens take ``1 + (c - 1) // QUERY_TILE`` tiles, so n sequences of two tokens or more
    take at most ``n + (num_tokens - n) // QUERY_TILE``, which grows with n.
    """
    sequences = min(num_sequences, num_tokens // 2)
    return sequences + (num_tokens - sequences) // QUERY_TILE
