"""Where the tokens of one ragged forward stand: in their sequences and in the KV blocks."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from engine.model.sequence_groups import SequenceGroups, group_sequences


@dataclass(frozen=True)
class PagedKv:
    """Where keys and values of a serving step are written and read.

    Attributes:
        kv_index_T: int64 ``[T]``, place of each token's key and value: block id * block size +
            offset in the block.
        block_table_SB: int64, a row a sequence: the ids of its blocks in order, enough for its
            context, then anything; rows may lie apart.
        context_lengths: for each sequence its tokens so far, those of this step included.
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
    """The sequences that lie one after another in a ragged ``[T, D]`` batch.

    Attributes:
        positions_T: int64 ``[T]``, each token's position in its own sequence.
        query_starts: S + 1 offsets; sequence s owns rows ``[query_starts[s], query_starts[s+1])``.
        paged: given when earlier keys and values come from KV blocks (serving); without it every
            sequence is complete in the batch (training, scoring).
    """

    positions_T: Tensor
    query_starts: tuple[int, ...]
    paged: PagedKv | None = None

    @cached_property
    def groups(self) -> SequenceGroups:
        """The sequences in rectangles, made once for all layers; all are complete."""
        return group_sequences(self.query_starts, self.positions_T.device)

    @cached_property
    def query_starts_S1(self) -> Tensor:
        """The offsets as int64 on the CPU, made once for all layers."""
        return torch.tensor(self.query_starts, dtype=torch.int64)

    def to(self, device: torch.device) -> "TokenLayout":
        """The same layout with its tensors on a device."""
        paged = self.paged
        if paged is not None:
            moved = paged.kv_index_T.to(device), paged.block_table_SB.to(device)
            paged = PagedKv(*moved, paged.context_lengths)
        return TokenLayout(self.positions_T.to(device), self.query_starts, paged)

    def part(self, first: int, last: int) -> "TokenLayout":
        """The tokens ``[first, last)`` of a paged layout as a step of their own.

        What lies before them in their sequences must have been run, layer by layer, when they are.
        """
        assert self.paged is not None and first < last
        spans = list(pairwise(self.query_starts))
        own = [s for s, (start, end) in enumerate(spans) if start < last and first < end]
        starts = (first, *(min(spans[s][1], last) for s in own))
        contexts = (
            self.paged.context_lengths[s] - (spans[s][1] - end)
            for s, end in zip(own, starts[1:], strict=True)
        )
        return TokenLayout(
            self.positions_T[first:last],
            tuple(start - first for start in starts),
            PagedKv(
                self.paged.kv_index_T[first:last],
                self.paged.block_table_SB[own[0] : own[-1] + 1],
                tuple(contexts),
            ),
        )
