"""Runs a step as pipelined micro-batches so that row fetches overlap compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.layers import CpuLayer
from engine.executors.cpu.packed_layers import PackedLayers
from engine.executors.lookahead import Lookahead
from engine.model.layout import TokenLayout
from engine.progress import Progress
from memory_ops.tables.table_statistics import TableStatistics

# (tokens of a step, micro-batches): each micro-batch reads the weights once more, which costs more
# than overlap gains for fewer tokens. With 3 memories of 128 rows, a quarter of them fetched, and a
# disk of 100,000 reads a second: 16 tokens take 43 ms in two, 34 in one; 32 take 63 (67), 64 take
# 96 (113), 512 take 570 in four (755).
_COUNTS = ((256, 4), (32, 2))
# share of the rows asked for; fetching fewer takes less time than reading the weights once more
_LEAST_FETCHED = 0.1


@dataclass
class _MicroBatch:
    """Consecutive tokens of a step, with the residual stream after the layers run so far."""

    residual_TD: Tensor
    layout: TokenLayout
    angles: tuple[Tensor, Tensor]


class MicroBatches:
    """Runs packed layers on the micro-batches of a step, if its memory layers fetch all rows.

    A memory layer's rows follow from the residual stream that enters it, so nothing of the same
    tokens can be computed while they are fetched. Later tokens can, up to that layer: of earlier
    ones they need only keys and values of the layers before it. So each micro-batch runs up to its
    next memory layer, starts fetching, and lets the next micro-batch run.
    """

    def __init__(
        self,
        layers: Sequence[CpuLayer],
        num_heads: int,
        kernels: CpuKernels,
        progress: Progress,
        lookahead: Lookahead | None = None,
    ) -> None:
        self._layers, self._kernels = layers, kernels
        self._progress, self._lookahead = progress, lookahead
        # native calls leave memories out: they stop there
        self._packed = PackedLayers(
            [layer.packed._replace(memory=None) for layer in layers], num_heads
        )
        memories = [layer.memory for layer in layers if layer.memory is not None]
        tables = [table for memory in memories for table in memory.tables]
        capacities = [
            capacity for table in tables if (capacity := table.fetched_capacity) is not None
        ]
        self._tables = {id(table): table for table in tables}.values()
        self._fetched_share = 1.0  # of the rows asked for by the last step of many tokens
        self._token_rows = max((one.num_heads * one.top_k for one in memories), default=0)
        self._num_rows = max((table.num_rows for table in tables), default=0)
        # rows that every table can hold at once; 0 if nothing, or not everything, is fetched
        self._capacity = 0
        if tables and len(capacities) == len(tables):
            self._capacity = min(capacities)

    def count(self, num_tokens: int) -> int:
        """The number of micro-batches for the coming step; 1 if more would gain nothing."""
        # all rows of the step must fit: a micro-batch could otherwise find no space while those
        # before it wait for their turn
        if not 0 < min(num_tokens * self._token_rows, self._num_rows) <= self._capacity:
            return 1
        if self._fetched_share < _LEAST_FETCHED:
            return 1
        return next((count for least, count in _COUNTS if num_tokens >= least), 1)

    @contextmanager
    def watched(self, num_tokens: int) -> Iterator[None]:
        """Wrap a step: the share of rows that a large one fetches decides about the next one."""
        if not self._capacity or num_tokens < _COUNTS[-1][0]:
            yield
            return
        before = self._statistics()
        yield
        step = self._statistics().since(before)
        self._fetched_share = (step.misses + step.late) / max(1, step.requested_rows)

    def _statistics(self) -> TableStatistics:
        counts = [one for table in self._tables for one in table.statistics().values()]
        return TableStatistics.sum(counts)

    def run(
        self,
        residual_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor,
        count: int,
    ) -> Tensor:
        """Return the residual stream after the last layer; arguments as of ``CpuDecoder.run``."""
        num_tokens = residual_TD.shape[0]
        edges = [num_tokens * i // count for i in range(count + 1)]
        cosines, sines = angles
        parts = [
            _MicroBatch(
                residual_TD[first:last],
                layout.part(first, last),
                (cosines[first:last], sines[first:last]),
            )
            for first, last in pairwise(edges)
        ]
        # all have the same number of stops; after the last one each runs to its end
        for _ in zip(*(self._stops(part, kv_blocks) for part in parts), strict=True):
            pass
        return torch.cat([part.residual_TD for part in parts])

    def _stops(self, part: _MicroBatch, kv_blocks: Tensor) -> Iterator[None]:
        """Run all layers on a micro-batch; yield while its rows are fetched."""
        paged = part.layout.paged
        assert paged is not None
        for index, layer in enumerate(self._layers):
            run = range(index, index + 1)
            residual_TD = part.residual_TD
            if self._lookahead is not None:
                self._lookahead.before(index, residual_TD)
            self._kernels.decoder_layers(
                self._packed, run, residual_TD, part.angles, part.layout, paged, kv_blocks
            )
            if layer.memory is not None:
                lookup = layer.memory.start(residual_TD)
                yield
                part.residual_TD = layer.memory.finish(lookup, residual_TD)
            elif layer.other is not None:
                part.residual_TD = layer.other.run(residual_TD, None)
            self._progress.mark()
