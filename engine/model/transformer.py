"""The decoder: token ids and their layout in, logits at chosen positions out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from engine import ops
from engine.model.config import ModelConfig
from engine.model.forward_trace import ForwardTrace, MemoryTrace
from engine.model.layers import DecoderLayer
from engine.model.lookahead import Lookahead, LookaheadConfig
from engine.model.norm import RmsNorm
from engine.model.packed_decoder import PackedDecoder
from engine.model.rotary import rope_angles, rope_frequencies
from engine.model.uninitialised import Embedding, Linear
from engine.ops.layout import TokenLayout
from engine.ops.native.library import native_ops
from memory_ops.tables.value_table import ValueTable


@dataclass(frozen=True)
class ForwardOutput:
    """What one forward gives.

    Attributes:
        logits_LV: ``[positions asked for, vocabulary]``.
        hidden_LD: the last norm's output at these positions, where it was asked for.
        memory: by layer what its memory read for all T tokens, where a trace was asked for.
        router_logits: of each mixture of experts, for all T tokens, likewise.
    """

    logits_LV: Tensor
    hidden_LD: Tensor | None
    memory: Mapping[int, MemoryTrace]
    router_logits: tuple[Tensor, ...]


def _run(layer: nn.Module, *arguments: object) -> Tensor:
    return layer(*arguments)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embedding, layers and last norm; its parameters carry Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A Llama-family decoder whose feed-forward is chosen per layer.

    Parameters are uninitialised: build it under ``torch.device("meta")`` and assign mapped weights,
    or initialise it to train. Value tables are attached, not owned.

    Attributes:
        config: its shapes.
        tables: those that are attached, by the names of ``ModelConfig.table_names``.
        run_layer: calls a layer with its arguments; a trainer may put another in its place, such
            as ``torch.utils.checkpoint``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tables: Mapping[str, ValueTable] = {}
        self.run_layer: Callable[..., Tensor] = _run
        self.model = Decoder(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        head = self.lm_head if self.lm_head is not None else self.model.embed_tokens
        self.head = ops.Projection(head, norm=self.model.norm)
        self._packed_layers: PackedDecoder | None = None
        self._lookahead: Lookahead | None = None
        # no parameter, and made on the CPU even where the rest is built on the meta device
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)
        self.rope_frequencies: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Move and cast as any module; angles want frequencies in full precision."""
        frequencies = self.rope_frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rope_frequencies = frequencies.to(self.rope_frequencies.device)
        return self

    def attach_tables(self, tables: Mapping[str, ValueTable]) -> None:
        """Give the memory layers their tables, by the names of ``ModelConfig.table_names``.

        Raises:
            ValueError: a table is missing, unknown, or of a wrong shape; or the model is packed,
                tables included.
        """
        if self._packed_layers is not None:
            raise ValueError("tables: the model is packed, with those that it has")
        wanted, memory = self.config.table_names, self.config.memory
        if set(tables) != set(wanted):
            raise ValueError(f"tables: expected {list(wanted)}, got {sorted(tables)}")
        for name, table in tables.items():
            assert memory is not None
            shape = (table.num_rows, table.value_dim)
            if shape != (memory.num_rows, memory.value_dim):
                wanted_shape = (memory.num_rows, memory.value_dim)
                raise ValueError(f"tables: {name} needs {wanted_shape}, got {shape}")
        self.tables = dict(tables)
        for layer in self.config.memory_layers:
            block, names = self.model.layers[layer], self.config.layer_tables(layer)
            assert isinstance(block, DecoderLayer) and block.memory is not None
            block.memory.attach(tables[names.values], tables.get(names.down or ""))

    def look_ahead(self, config: LookaheadConfig) -> None:
        """Have rows guessed for the tables that are attached, and fetched before they are read.

        Raises:
            ValueError: the model is packed already.
        """
        if self._packed_layers is not None:
            raise ValueError("lookahead: the model is packed, without it")
        memories = [layer.memory for layer in self.model.layers if isinstance(layer, DecoderLayer)]
        self._lookahead = Lookahead([memory for memory in memories if memory is not None], config)

    @property
    def is_packed(self) -> bool:
        """Whether native kernels run the layers; these count the progress that they make."""
        return self._packed_layers is not None

    def pack(self) -> None:
        """Lay the weights out for this machine's kernels, where it has any.

        Then the model serves and does no more: its weights are given up, and with them gradients
        and ``state_dict``.
        """
        weight = self.model.embed_tokens.weight
        native = native_ops(weight.device, weight.dtype)
        if native is None:
            return
        self._packed_layers = PackedDecoder(
            self.model.layers, self.config.num_heads, native, self._lookahead
        )
        self.head.pack(native)

    def forward(
        self,
        ids_T: Tensor,
        layout: TokenLayout,
        logits_at_L: Tensor,
        kv_blocks: Tensor | None = None,
        with_hidden: bool = False,
        with_trace: bool = False,
        on_layers: Callable[[], None] | None = None,
    ) -> ForwardOutput:
        """Run T tokens of several sequences, lying one after another.

        Args:
            ids_T: int64 token ids, ``[T]``.
            layout: which sequence and position each of them has.
            logits_at_L: int64 indices into the T tokens whose logits are wanted.
            kv_blocks: ``[layers, blocks, 2, G, block_size, E]``, changed in place; given exactly
                when ``layout.paged`` is.
            with_hidden: whether the output has what the logits are made of.
            with_trace: whether the output tells what memory layers read and routers said.
            on_layers: called after each layer, or a few that take no longer than a large one.
        """
        residual_TD = self.model.embed_tokens(ids_T)
        angles = rope_angles(layout.positions_T, self.rope_frequencies)
        trace = ForwardTrace() if with_trace else None
        on_layers = on_layers or (lambda: None)
        if self._packed_layers is not None and kv_blocks is not None:
            residual_TD = self._packed_layers.run(
                residual_TD, layout, angles, kv_blocks, trace, on_layers
            )
        else:
            for index, layer in enumerate(self.model.layers):
                if self._lookahead is not None:
                    self._lookahead.before(index, residual_TD)
                layer_kv = kv_blocks[index] if kv_blocks is not None else None
                residual_TD = self.run_layer(layer, residual_TD, layout, angles, layer_kv, trace)
                on_layers()
        residual_LD = residual_TD[logits_at_L]
        return ForwardOutput(
            ops.linear(residual_LD, self.head),
            self.model.norm(residual_LD) if with_hidden else None,
            dict(zip(self.config.memory_layers, trace.memory, strict=True)) if trace else {},
            tuple(trace.router_logits) if trace else (),
        )
