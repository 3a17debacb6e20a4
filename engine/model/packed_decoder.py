"""A decoder's layers, packed, by few native calls."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from engine.model.forward_trace import ForwardTrace, MemoryTrace
from engine.model.layers import DecoderLayer
from engine.model.lookahead import Lookahead
from engine.model.parts_by_turns import PartsByTurns
from engine.ops.layout import TokenLayout
from engine.ops.native.library import NativeOps
from engine.ops.native.packed_layers import PackedLayers

# a call more costs nothing beside so many tokens, or the reading of so many bytes: then calls stay
# short, and tell that the step gets on
_FEW_TOKENS = 64
_MANY_BYTES = 2**28


class PackedDecoder:
    """Runs all layers of a decoder for serving; packing gives their weights up."""

    def __init__(
        self,
        layers: nn.ModuleList,
        num_heads: int,
        native: NativeOps,
        lookahead: Lookahead | None = None,
    ) -> None:
        self._native, self._lookahead = native, lookahead
        self._decoders = [layer for layer in layers if isinstance(layer, DecoderLayer)]
        products = [layer.pack(native) for layer in self._decoders]
        # those whose feed-forward the native calls leave out
        self._apart = [own.gate_up is None and own.memory is None for own in products]
        self._layers = PackedLayers(products, num_heads)
        self._runs = self._joined([own.num_bytes for own in products])
        self._by_turns = PartsByTurns(self._decoders, products, num_heads, native, lookahead)

    def run(
        self,
        residual_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor,
        trace: ForwardTrace | None,
        on_layers: Callable[[], None],
    ) -> Tensor:
        """Return what the last layer leaves; the arguments are those of ``Transformer.forward``."""
        assert layout.paged is not None
        num_tokens = residual_TD.shape[0]
        num_parts = 1 if trace is not None else self._by_turns.num_parts(num_tokens)
        runs = self._runs
        if num_tokens > _FEW_TOKENS:
            runs = [range(i, i + 1) for i in range(len(self._decoders))]
        with self._by_turns.watched(num_tokens):
            if num_parts > 1:
                return self._by_turns.run(
                    residual_TD, layout, angles, kv_blocks, on_layers, num_parts
                )
            for run in runs:
                if self._lookahead is not None:
                    self._lookahead.before(run.start, residual_TD)
                read = self._native.decoder_layers(
                    self._layers, run, residual_TD, angles, layout, layout.paged, kv_blocks
                )
                if trace is not None:
                    trace.memory += [MemoryTrace(*one) for one in zip(*read, strict=True)]
                if self._apart[run[-1]]:
                    residual_TD = self._decoders[run[-1]].feed_forward(residual_TD, trace)
                on_layers()
            return residual_TD

    def _joined(self, num_bytes: Sequence[int]) -> list[range]:
        """The layers in runs that end where they have grown large, with a feed-forward apart, or
        before a layer where rows are guessed."""
        guessed = self._lookahead.layers if self._lookahead is not None else ()
        runs, first, size = [], 0, 0
        for index, own in enumerate(num_bytes):
            size += own
            is_last = index + 1 == len(num_bytes)
            if is_last or self._apart[index] or index + 1 in guessed or size >= _MANY_BYTES:
                runs.append(range(first, index + 1))
                first, size = index + 1, 0
        return runs
