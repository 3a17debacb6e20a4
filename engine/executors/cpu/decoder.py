"""Runs packed decoder layers in few native calls."""

from collections.abc import Sequence

from torch import Tensor

from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.layers import CpuLayer
from engine.executors.cpu.micro_batches import MicroBatches
from engine.executors.cpu.packed_layers import PackedLayers
from engine.executors.lookahead import Lookahead
from engine.model.forward_trace import ForwardTrace, MemoryTrace
from engine.model.layout import TokenLayout
from engine.progress import Progress

# With more tokens per step, or more bytes of weights per call, than these, one call per layer costs
# little in comparison, and shorter calls show that the step makes progress.
_FEW_TOKENS = 64
_MANY_BYTES = 2**28


class CpuDecoder:
    """All layers of a decoder."""

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
        self._packed = PackedLayers([layer.packed for layer in layers], num_heads)
        self._runs = self._joined()
        self._micro_batches = MicroBatches(layers, num_heads, kernels, progress, lookahead)

    def run(
        self,
        residual_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor,
        trace: ForwardTrace | None = None,
    ) -> Tensor:
        """Return the residual stream after the last layer; ``residual_TD`` is changed in place.

        The other arguments are those of ``DecoderLayer``, with the KV blocks of all layers.
        """
        assert layout.paged is not None
        num_tokens = residual_TD.shape[0]
        count = self._micro_batches.count.of(num_tokens)
        runs = self._runs
        if num_tokens > _FEW_TOKENS:
            runs = [range(i, i + 1) for i in range(len(self._layers))]
        with self._micro_batches.count.watched(num_tokens):
            if count > 1:
                return self._micro_batches.run(residual_TD, layout, angles, kv_blocks, count, trace)
            for run in runs:
                if self._lookahead is not None:
                    self._lookahead.before(run.start, residual_TD)
                read = self._kernels.decoder_layers(
                    self._packed, run, residual_TD, angles, layout, layout.paged, kv_blocks
                )
                if trace is not None:
                    trace.memory += [MemoryTrace(*one) for one in zip(*read, strict=True)]
                last = self._layers[run[-1]]
                if last.is_apart:
                    residual_TD = last.run_apart(residual_TD, trace, layout.patches)
                self._progress.mark()
            return residual_TD

    def _joined(self) -> list[range]:
        """Split the layers into runs, one native call each.

        A run ends if its weights are large, after a feed-forward that runs apart, and before a
        layer at which rows are predicted.
        """
        predicted = self._lookahead.layers if self._lookahead is not None else ()
        runs, first, size = [], 0, 0
        for index, layer in enumerate(self._layers):
            size += layer.packed.num_bytes
            is_last = index + 1 == len(self._layers)
            if is_last or layer.is_apart or index + 1 in predicted or size >= _MANY_BYTES:
                runs.append(range(first, index + 1))
                first, size = index + 1, 0
        return runs
