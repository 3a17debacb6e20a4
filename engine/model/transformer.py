"""The decoder: token ids and their layout in, logits at the requested positions out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from engine.model.config import ModelConfig
from engine.model.forward_trace import ForwardTrace, MemoryTrace
from engine.model.grouped_layers import (
    GroupedEmbedding,
    GroupedLinear,
    dense_state,
    group_formats,
    use_groups,
)
from engine.model.grouped_weights import GroupFormat
from engine.model.layers import DecoderLayer
from engine.model.layout import TokenLayout
from engine.model.norm import RmsNorm
from engine.model.rotary import rope_amplitude, rope_angles, rope_frequencies
from engine.model.uninitialised import Embedding, Linear
from memory_ops.tables.value_table import ValueTable


@dataclass(frozen=True)
class ForwardOutput:
    """The results of one forward.

    Attributes:
        logits_LV: ``[requested positions, vocabulary]``.
        hidden_LD: the last norm's output at these positions, if requested.
        memory: traces of the memory layers by layer index, if requested.
        router_logits: router logits ``[T, E]`` of the mixtures, with the traces.
    """

    logits_LV: Tensor
    hidden_LD: Tensor | None
    memory: Mapping[int, MemoryTrace]
    router_logits: tuple[Tensor, ...]


def _run(layer: nn.Module, *arguments: object) -> Tensor:
    return layer(*arguments)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embedding, layers and last norm, with Hugging Face's parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens: nn.Embedding | GroupedEmbedding = Embedding(
            config.vocab_size, config.hidden_size
        )
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A Llama-family decoder with a kind of feed-forward per layer.

    Parameters are uninitialised: build it under ``torch.device("meta")`` and assign mapped weights,
    or initialise it to train. It does not own its value tables. If weights are in groups
    (``use_groups``), only an executor can run it; see ``converted``.

    Attributes:
        tables: the attached tables, by the names of ``ModelConfig.table_names``.
        run_layer: calls a layer with its arguments; a trainer may replace it, for instance by
            ``torch.utils.checkpoint``.
        head_product: computes the logits from hidden states ``[L, D]`` and the head's weight.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tables: Mapping[str, ValueTable] = {}
        self.run_layer: Callable[..., Tensor] = _run
        self.head_product: Callable[[Tensor, Tensor], Tensor] = linear
        self.model = Decoder(config)
        self.lm_head: nn.Linear | GroupedLinear | None = None
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        # not a parameter; on the CPU even if the rest is built on the meta device
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)
        self.rope_amplitude = rope_amplitude(config.rope_scaling)
        self.rope_frequencies: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Move and cast like any module, but keep the rotary frequencies in fp32."""
        frequencies = self.rope_frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rope_frequencies = frequencies.to(self.rope_frequencies.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights that are not in groups."""
        return self.model.norm.weight.dtype

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, in order."""
        return [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]

    @property
    def head(self) -> nn.Linear | nn.Embedding | GroupedLinear | GroupedEmbedding:
        """The module whose weight ``[vocabulary, D]`` computes the logits."""
        return self.lm_head if self.lm_head is not None else self.model.embed_tokens

    def attach_tables(self, tables: Mapping[str, ValueTable]) -> None:
        """Attach the tables ``ModelConfig.table_names``; ValueError for a wrong name or shape."""
        wanted, memory = self.config.table_names, self.config.memory
        if set(tables) != set(wanted):
            raise ValueError(f"tables: expected {list(wanted)}, got {sorted(tables)}")
        for name, table in tables.items():
            assert memory is not None
            shape, expected = (table.num_rows, table.value_dim), (memory.num_rows, memory.value_dim)
            if shape != expected:
                raise ValueError(f"tables: {name} needs {expected}, got {shape}")
        self.tables = dict(tables)
        for layer in self.config.memory_layers:
            memory_layer, names = self.layers[layer].memory, self.config.layer_tables(layer)
            assert memory_layer is not None
            memory_layer.attach(tables[names.values], tables.get(names.down or ""))

    def forward(
        self,
        ids_T: Tensor,
        layout: TokenLayout,
        logits_at_L: Tensor,
        kv_blocks: Tensor | None = None,
        *,
        with_hidden: bool = False,
        with_trace: bool = False,
        before_layer: Callable[[int, Tensor], None] | None = None,
    ) -> ForwardOutput:
        """Run T tokens of concatenated sequences.

        Args:
            ids_T: int64 token ids, ``[T]``.
            layout: the sequence and position of each token.
            logits_at_L: int64 indices of the tokens to compute logits at.
            kv_blocks: ``[layers, blocks, 2, G, block_size, E]``, changed in place; given if and
                only if ``layout.paged`` is.
            with_hidden: whether to return ``hidden_LD``.
            with_trace: whether to return ``memory`` and ``router_logits``.
            before_layer: called with each layer's index and the residual stream that enters it.
        """
        x_TD = self.model.embed_tokens(ids_T)
        angles = rope_angles(layout.positions_T, self.rope_frequencies, self.rope_amplitude)
        trace = ForwardTrace() if with_trace else None
        for index, layer in enumerate(self.model.layers):
            if before_layer is not None:
                before_layer(index, x_TD)
            layer_kv = kv_blocks[index] if kv_blocks is not None else None
            x_TD = self.run_layer(layer, x_TD, layout, angles, layer_kv, trace)
        hidden_LD = self.model.norm(x_TD[logits_at_L])
        return ForwardOutput(
            self.head_product(hidden_LD, self.head.weight),
            hidden_LD if with_hidden else None,
            dict(zip(self.config.memory_layers, trace.memory, strict=True)) if trace else {},
            tuple(trace.router_logits) if trace else (),
        )


def converted(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model with dense weights of a dtype, and the same tables.

    It shares the weights that need no change.
    """
    if all(parameter.dtype is dtype for parameter in model.parameters()):
        return model
    return _rebuilt(model, dense_state(model, dtype), {}, model.tables)


def with_tables(model: Transformer, tables: Mapping[str, ValueTable]) -> Transformer:
    """The model with other value tables; it shares all weights."""
    return _rebuilt(model, model.state_dict(), group_formats(model), tables)


def _rebuilt(
    model: Transformer,
    weights: Mapping[str, Tensor],
    formats: Mapping[str, GroupFormat],
    tables: Mapping[str, ValueTable],
) -> Transformer:
    with torch.device("meta"):
        made = Transformer(model.config)
        use_groups(made, formats)
    made.load_state_dict(weights, assign=True)
    made.rope_frequencies, made.run_layer = model.rope_frequencies, model.run_layer
    made.attach_tables(tables)
    return made.eval().requires_grad_(False)
