"""Many tokens in parts that take turns: one's rows are fetched while another's layers run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.model.layers import DecoderLayer
from engine.model.lookahead import Lookahead
from engine.ops.layout import TokenLayout
from engine.ops.native.library import NativeOps
from engine.ops.native.packed_layers import LayerProducts, PackedLayers
from memory_ops.tables.table_statistics import TableStatistics

# parts from so many tokens on; smaller ones lose more to reading the weights once each than they
# gain. With 3 memories, 128 rows each, a quarter of them fetched, a disk of 100,000 reads a second:
# 16 tokens take 43 ms by turns, 34 otherwise; 32 take 63 (67), 64 take 96 (113), 512 take 570 (755)
_NUM_PARTS = ((256, 4), (32, 2))
# of the rows asked for; fewer are fetched sooner than weights are read once more
_LEAST_FETCHED = 0.1


@dataclass
class _Part:
    """Consecutive tokens of a step; ``residual_TD`` is what the layers so far have left."""

    residual_TD: Tensor
    layout: TokenLayout
    angles: tuple[Tensor, Tensor]


class PartsByTurns:
    """Runs packed layers on a step in parts, where its memories have all rows fetched.

    A memory's rows follow from what enters it, so nothing of the same tokens can be computed while
    they are fetched. Later tokens can, up to that memory: of earlier ones they need no more than
    keys and values of the layers before it. So each part of a step goes on to its next memory, has
    its rows fetched, and lets the next part go on.
    """

    def __init__(
        self,
        decoders: Sequence[DecoderLayer],
        products: Sequence[LayerProducts],
        num_heads: int,
        native: NativeOps,
        lookahead: Lookahead | None = None,
    ) -> None:
        """Take the layers of a decoder, which are packed, in order."""
        self._native, self._decoders, self._lookahead = native, decoders, lookahead
        self._layers = PackedLayers([own._replace(memory=None) for own in products], num_heads)
        memories = [layer.memory for layer in decoders if layer.memory is not None]
        tables = [table for memory in memories for table in memory.tables]
        capacities = [
            capacity for table in tables if (capacity := table.fetched_capacity) is not None
        ]
        self._tables = {id(table): table for table in tables}.values()
        self._fetched_share = 1.0  # of the rows asked for by the last step of many tokens
        self._token_rows = max((one.num_heads * one.top_k for one in memories), default=0)
        self._num_rows = max((table.num_rows for table in tables), default=0)
        # for rows of any table; 0 where there is nothing, or not all, to be fetched
        self._room = 0
        if tables and len(capacities) == len(tables):
            self._room = min(capacities)

    def num_parts(self, num_tokens: int) -> int:
        """How many parts the coming step should be run in; 1 where turns would gain nothing."""
        # were there no room for all, a part could find none while those before it wait for turns
        if not 0 < min(num_tokens * self._token_rows, self._num_rows) <= self._room:
            return 1
        if self._fetched_share < _LEAST_FETCHED:
            return 1
        return next((parts for least, parts in _NUM_PARTS if num_tokens >= least), 1)

    @contextmanager
    def watched(self, num_tokens: int) -> Iterator[None]:
        """Around a step: what one of many tokens fetches decides about the next one."""
        if not self._room or num_tokens < _NUM_PARTS[-1][0]:
            yield
            return
        before = self._counts()
        yield
        step = self._counts().since(before)
        self._fetched_share = (step.misses + step.late) / max(1, step.requested_rows)

    def _counts(self) -> TableStatistics:
        counts = [one for table in self._tables for one in table.statistics().values()]
        return TableStatistics.sum(counts)

    def run(
        self,
        residual_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor,
        on_layers: Callable[[], None],
        num_parts: int,
    ) -> Tensor:
        """Return what the last layer leaves; other arguments are ``Transformer.forward``'s."""
        num_tokens = residual_TD.shape[0]
        edges = [num_tokens * i // num_parts for i in range(num_parts + 1)]
        cosines, sines = angles
        parts = [
            _Part(
                residual_TD[first:last],
                layout.part(first, last),
                (cosines[first:last], sines[first:last]),
            )
            for first, last in pairwise(edges)
        ]
        # as many turns each; behind the last one each runs to its end
        for _ in zip(*(self._turns(part, kv_blocks, on_layers) for part in parts), strict=True):
            pass
        return torch.cat([part.residual_TD for part in parts])

    def _turns(
        self, part: _Part, kv_blocks: Tensor, on_layers: Callable[[], None]
    ) -> Iterator[None]:
        """Run all layers on a part; while its rows are fetched it is another's turn."""
        paged = part.layout.paged
        assert paged is not None
        for index, layer in enumerate(self._decoders):
            run = range(index, index + 1)
            residual_TD = part.residual_TD
            if self._lookahead is not None:
                self._lookahead.before(index, residual_TD)
            self._native.decoder_layers(
                self._layers, run, residual_TD, part.angles, part.layout, paged, kv_blocks
            )
            if layer.memory is not None:
                lookup = layer.memory.start(residual_TD)
                yield
                part.residual_TD = layer.memory.finish(lookup, residual_TD, residual_TD)
            elif layer.block_sparse_moe is not None:
                part.residual_TD = layer.feed_forward(residual_TD, None)
            on_layers()
