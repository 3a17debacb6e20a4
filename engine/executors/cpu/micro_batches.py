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
from engine.model.forward_trace import ForwardTrace
from engine.model.layout import TokenLayout
from engine.progress import Progress
from memory_ops.tables.table_statistics import TableStatistics

# (minimum tokens of a step, micro-batches): each micro-batch reads all weights again, which costs
# more than overlap gains for fewer tokens. With 3 memories of 128 rows, a quarter of them fetched,
# and a disk of 100,000 reads per second: 16 tokens take 43 ms as two, 34 as one; 32 take 63 (67),
# 64 take 96 (113), 512 take 570 as four (755).
_COUNTS = ((256, 4), (32, 2))
# minimum fraction of rows fetched: fetching fewer is faster than reading the weights again
_MIN_FETCHED = 0.1


@dataclass
class _MicroBatch:
    """Consecutive tokens of a step, with the residual stream after the layers run so far.

    ``trace`` is filled while it runs, if there is one.
    """

    residual_TD: Tensor
    layout: TokenLayout
    angles: tuple[Tensor, Tensor]
    trace: ForwardTrace | None


class MicroBatches:
    """Runs packed layers on the micro-batches of a step, if its memory layers fetch all rows.

    While a memory layer fetches rows, its tokens cannot advance. Later tokens can, up to that
    layer: of earlier tokens they need only the keys and values of the layers before it. So each
    micro-batch runs up to its next memory layer, starts fetching, and lets the next one run.
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
        # native calls stop before a memory layer and the feed-forward that is added to it
        without_memory = [
            layer.packed
            if layer.memory is None
            else layer.packed._replace(memory=None, gate_up=None, down=None)
            for layer in layers
        ]
        self._packed = PackedLayers(without_memory, num_heads)
        memories = [layer.memory for layer in layers if layer.memory is not None]
        tables = [table for memory in memories for table in memory.tables]
        capacities = [table.fetched_capacity or 0 for table in tables]
        self._tables = {id(table): table for table in tables}.values()
        self._fetched_fraction = 1.0  # of the rows requested by the last step of many tokens
        self._token_rows = max((one.num_heads * one.top_k for one in memories), default=0)
        self._num_rows = max((table.num_rows for table in tables), default=0)
        # rows that every table can hold at once; 0 unless all tables fetch their rows
        self._capacity = min(capacities, default=0)

    def count(self, num_tokens: int) -> int:
        """The number of micro-batches for the next step; 1 if more would not be faster."""
        # all rows of the step must fit, or a micro-batch could find no slot while others wait
        if not 0 < min(num_tokens * self._token_rows, self._num_rows) <= self._capacity:
            return 1
        if self._fetched_fraction < _MIN_FETCHED:
            return 1
        return next((count for least, count in _COUNTS if num_tokens >= least), 1)

    @contextmanager
    def watched(self, num_tokens: int) -> Iterator[None]:
        """Wrap a step: a large step's fraction of fetched rows decides about the next step."""
        if not self._capacity or num_tokens < _COUNTS[-1][0]:
            yield
            return
        before = self._statistics()
        yield
        step = self._statistics().since(before)
        self._fetched_fraction = (step.misses + step.late) / max(1, step.requested_rows)

    def _statistics(self) -> TableStatistics:
        return TableStatistics.sum(
            [counts for table in self._tables for counts in table.statistics().values()]
        )

    def run(
        self,
        residual_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor,
        count: int,
        trace: ForwardTrace | None = None,
    ) -> Tensor:
        """Return the residual stream after the last layer; arguments as of ``CpuDecoder.run``."""
        num_tokens = residual_TD.shape[0]
        edges = [num_tokens * i // count for i in range(count + 1)]
        cosines, sines = angles
        parts = [
            _MicroBatch(
                residual_TD[a:b],
                layout.part(a, b),
                (cosines[a:b], sines[a:b]),
                None if trace is None else ForwardTrace(),
            )
            for a, b in pairwise(edges)
        ]
        # all stop equally often; after the last stop each runs to its end
        for _ in zip(*(self._stops(part, kv_blocks) for part in parts), strict=True):
            pass
        if trace is not None:
            trace.extend_by_parts([part.trace for part in parts if part.trace is not None])
        return torch.cat([part.residual_TD for part in parts])

    def _stops(self, part: _MicroBatch, kv_blocks: Tensor) -> Iterator[None]:
        """Run all layers on a micro-batch; yield whenever it waits for rows."""
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
                lookup = layer.memory.start(residual_TD, part.trace, part.layout.patches)
                yield
                part.residual_TD = layer.finish(lookup, residual_TD)
            elif layer.other is not None:
                part.residual_TD = layer.other.run(residual_TD, part.trace, part.layout.patches)
            self._progress.mark()
