"""A decoder's layers, packed, by as few native calls as their memory layers leave."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from engine.model.layers import DecoderLayer
from engine.model.memory_layer import MemoryTrace
from engine.ops.layout import TokenLayout
from engine.ops.native.library import NativeOps
from engine.ops.native.packed_layers import PackedLayers

# a call more costs nothing beside so many tokens, or the reading of so many bytes: then calls stay
# short, and tell that the step gets on
_FEW_TOKENS = 64
_MANY_BYTES = 2**28


class PackedDecoder:
    """Runs all layers of a decoder for serving; packing gives their weights up."""

    def __init__(self, layers: nn.ModuleList, num_heads: int, native: NativeOps) -> None:
        self._native = native
        self._memories = []
        products = []
        for layer in layers:
            assert isinstance(layer, DecoderLayer)
            products.append(layer.pack(native))
            self._memories.append(layer.memory)
        self._layers = PackedLayers(products, num_heads)
        self._runs = self._joined([own.num_bytes for own in products])

    def run(
        self,
        residual_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor,
        trace: list[MemoryTrace] | None,
        on_layers: Callable[[], None],
    ) -> Tensor:
        """Return what the last layer leaves; the arguments are those of ``Transformer.forward``."""
        assert layout.paged is not None
        runs = self._runs
        if residual_TD.shape[0] > _FEW_TOKENS:
            runs = [range(i, i + 1) for i in range(len(self._memories))]
        for run in runs:
            self._native.decoder_layers(
                self._layers, run, residual_TD, angles, layout, layout.paged, kv_blocks
            )
            memory = self._memories[run[-1]]
            if memory is not None:
                residual_TD = memory(residual_TD, trace, residual_TD)
            on_layers()
        return residual_TD

    def _joined(self, num_bytes: Sequence[int]) -> list[range]:
        """The layers in runs that end with a memory layer, or where they have grown large."""
        runs, first, size = [], 0, 0
        for index, own in enumerate(num_bytes):
            size += own
            is_last = index + 1 == len(num_bytes)
            if is_last or self._memories[index] is not None or size >= _MANY_BYTES:
                runs.append(range(first, index + 1))
                first, size = index + 1, 0
        return runs
