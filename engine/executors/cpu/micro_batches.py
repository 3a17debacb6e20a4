"""Runs a step as pipelined micro-batches so that row fetches overlap compute."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.layers import CpuLayer
from engine.executors.cpu.packed_layers import PackedLayers
from engine.executors.lookahead import Lookahead
from engine.executors.micro_batch_count import MicroBatchCount, SplitRule
from engine.model.forward_trace import ForwardTrace
from engine.model.layout import TokenLayout
from engine.progress import Progress

# Each micro-batch reads all weights again, which costs more than overlap gains for fewer tokens, or
# if fewer rows are fetched. With 3 memories of 128 rows, a quarter of them fetched, and a disk of
# 100,000 reads per second: 16 tokens take 43 ms as two, 34 as one; 32 take 63 (67), 64 take 96
# (113), 512 take 570 as four (755).
CPU_SPLIT_RULE = SplitRule(counts=((256, 4), (32, 2)), least_fraction=0.1, needs_slots=True)


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

    Attributes:
        count: the number of micro-batches of each step.
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
        self.count = MicroBatchCount(memories, CPU_SPLIT_RULE)

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
