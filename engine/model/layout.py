"""Positions of a ragged batch's tokens in their sequences and in the KV blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model.row_patches import ForwardPatches
from engine.model.sequence_groups import SequenceGroups, group_sequences


@dataclass(frozen=True)
class PagedKv:
    """The KV blocks that a serving step writes and reads.

    Attributes:
        kv_index_T: int64, each token's block id * block size + offset in the block.
        block_table_SB: int64, per sequence the ids of the blocks of its context in order, then
            arbitrary values; rows may be strided.
        context_lengths: the number of each sequence's tokens, with those of this step.
    """

    kv_index_T: Tensor
    block_table_SB: Tensor
    context_lengths: tuple[int, ...]

    @cached_property
    def context_lengths_S(self) -> Tensor:
        """The lengths as int64 on the CPU, made once for all layers."""
        return torch.tensor(self.context_lengths, dtype=torch.int64)


@dataclass(frozen=True)
class TokenLayout:
    """The concatenated sequences of a ragged ``[T, D]`` batch.

    Attributes:
        positions_T: int64 ``[T]``, each token's position in its sequence.
        query_starts: S + 1 offsets; sequence s has rows ``[query_starts[s], query_starts[s+1])``.
        paged: the KV blocks, in serving; None if every sequence is complete in the batch.
        patches: the tokens' row patches, if any token has some.
    """

    positions_T: Tensor
    query_starts: tuple[int, ...]
    paged: PagedKv | None = None
    patches: ForwardPatches | None = None

    @cached_property
    def groups(self) -> SequenceGroups:
        """The complete sequences in rectangles, made once for all layers."""
        return group_sequences(self.query_starts, self.positions_T.device)

    @cached_property
    def query_starts_S1(self) -> Tensor:
        """The offsets as int64 on the CPU, made once for all layers."""
        return torch.tensor(self.query_starts, dtype=torch.int64)

    def to(self, device: torch.device) -> "TokenLayout":
        """This layout with its tensors on a device."""
        paged = self.paged
        if paged is not None:
            moved = paged.kv_index_T.to(device), paged.block_table_SB.to(device)
            paged = PagedKv(*moved, paged.context_lengths)
        return TokenLayout(self.positions_T.to(device), self.query_starts, paged, self.patches)

    def part(self, first: int, last: int) -> "TokenLayout":
        """The tokens ``[first, last)`` of a paged layout as a separate step.

        In each layer, run them after the earlier tokens of their sequences.
        """
        assert self.paged is not None
        own, starts, contexts = part_of_sequences(
            self.query_starts, self.paged.context_lengths, first, last
        )
        paged = PagedKv(self.paged.kv_index_T[first:last], self.paged.block_table_SB[own], contexts)
        patches = None if self.patches is None else self.patches.part(first, last)
        return TokenLayout(self.positions_T[first:last], starts, paged, patches)


class SequencePart(NamedTuple):
    """The sequences of consecutive tokens of a step, as those of a separate step.

    Attributes:
        own: the sequences of the step that have tokens in the part.
        query_starts: offsets of these sequences in the part's tokens.
        context_lengths: the number of their tokens up to the end of the part.
    """

    own: slice
    query_starts: tuple[int, ...]
    context_lengths: tuple[int, ...]


def part_of_sequences(
    query_starts: Sequence[int], context_lengths: Sequence[int], first: int, last: int
) -> SequencePart:
    """The sequences of the tokens ``[first, last)``, at least one; see ``TokenLayout``."""
    assert first < last
    spans = list(pairwise(query_starts))
    own = [s for s, (start, end) in enumerate(spans) if start < last and first < end]
    ends = [min(spans[s][1], last) for s in own]
    contexts = tuple(
        context_lengths[s] - (spans[s][1] - end) for s, end in zip(own, ends, strict=True)
    )
    starts = (0, *(end - first for end in ends))
    return SequencePart(slice(own[0], own[-1] + 1), starts, contexts)
