"""Decoder layers with packed weights, and feed-forwards that run outside the native call."""

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.memory import CpuMemory
from engine.executors.cpu.mixture import CpuMixture
from engine.executors.cpu.packed_layers import PackedLayer
from engine.executors.cpu.packed_linear import PackedLinear
from engine.executors.cpu.packing import Packer
from engine.model.feed_forward import DenseFeedForward
from engine.model.forward_trace import ForwardTrace
from engine.model.layers import DecoderLayer
from engine.model.mixture import MixtureFeedForward
from engine.model.norm import RmsNorm
from engine.model.row_patches import ForwardPatches
from memory_ops.tables.value_table import Lookup


@dataclass(frozen=True)
class EagerFeedForward:
    """A feed-forward of a kind without a packed form: the model's own module."""

    norm: RmsNorm
    module: nn.Module

    def run(
        self, residual_TD: Tensor, trace: ForwardTrace | None, patches: ForwardPatches | None
    ) -> Tensor:
        """Return the new residual stream."""
        y_TD: Tensor = self.module(self.norm(residual_TD), trace, patches)
        return residual_TD + y_TD


@dataclass(frozen=True)
class CpuDense:
    """A ``DenseFeedForward`` with packed weights, norm and residual sum included."""

    kernels: CpuKernels
    gate_up: PackedLinear
    down: PackedLinear

    def hidden(self, residual_TD: Tensor) -> Tensor:
        """The values between its products, ``[T, I]``."""
        return self.kernels.linear(self.gate_up, residual_TD)

    def add(self, hidden_TI: Tensor, residual_TD: Tensor) -> Tensor:
        """Return the new residual stream."""
        return self.kernels.linear(self.down, hidden_TI, residual_TD)


@dataclass(frozen=True)
class CpuLayer:
    """One decoder layer.

    Attributes:
        packed: the layer in native form. If the kernels cannot run a part of it, it has no
            feed-forward and no memory.
        memory: the layer's memory, if it has one, in native form or not.
        beside: a dense feed-forward beside that memory.
        other: any other feed-forward that runs apart.
    """

    packed: PackedLayer
    memory: CpuMemory | None = None
    beside: CpuDense | None = None
    other: CpuMixture | EagerFeedForward | None = None

    @property
    def is_apart(self) -> bool:
        """Whether the feed-forward runs outside the native call."""
        return self.packed.gate_up is None and self.packed.memory is None

    def run_apart(
        self, residual_TD: Tensor, trace: ForwardTrace | None, patches: ForwardPatches | None
    ) -> Tensor:
        """Run all after attention outside the native call; return the new residual stream."""
        if self.other is not None:
            return self.other.run(residual_TD, trace, patches)
        assert self.memory is not None
        lookup = self.memory.start(residual_TD, trace, patches)
        return self.finish(lookup, residual_TD)

    def finish(self, lookup: Lookup, residual_TD: Tensor) -> Tensor:
        """Finish ``memory``, which was started with the same residual stream, and run ``beside``.

        Return the new residual stream.
        """
        assert self.memory is not None
        if self.beside is None:
            return self.memory.finish(lookup, residual_TD)
        # both read the residual stream before either is added to it
        hidden_TI = self.beside.hidden(residual_TD)
        return self.beside.add(hidden_TI, self.memory.finish(lookup, residual_TD))


def pack_layer(packer: Packer, layer: DecoderLayer) -> CpuLayer:
    """Pack one layer of a model, which is not changed."""
    attention, norm = layer.self_attn, layer.post_attention_layernorm
    qkv = packer.linear(
        attention.q_proj, attention.k_proj, attention.v_proj, norm=layer.input_layernorm
    )
    packed = PackedLayer(
        qkv, packer.linear(attention.o_proj), head_norms=packer.head_norms(attention)
    )
    feed_forward = layer.feed_forward
    dense = _pack_dense(packer, feed_forward, norm)
    if layer.memory is not None:
        memory = CpuMemory(packer, layer.memory, norm)
        native = memory.packed()
        if native is not None:
            packed = _with_dense(packed._replace(memory=native), dense)
        return CpuLayer(packed, memory=memory, beside=dense)
    if dense is not None:
        return CpuLayer(_with_dense(packed, dense))
    if isinstance(feed_forward, MixtureFeedForward):
        return CpuLayer(packed, other=CpuMixture(packer, feed_forward, norm))
    assert feed_forward is not None
    # a copy, which shares no weights with the model
    module = copy.deepcopy(feed_forward).to(packer.dtype)
    return CpuLayer(packed, other=EagerFeedForward(packer.norm(norm), module))


def _pack_dense(packer: Packer, module: nn.Module | None, norm: RmsNorm) -> CpuDense | None:
    if not isinstance(module, DenseFeedForward):
        return None
    gate_up = packer.linear(module.gate_proj, module.up_proj, norm=norm, is_gated=True)
    return CpuDense(packer.kernels, gate_up, packer.linear(module.down_proj))


def _with_dense(packed: PackedLayer, dense: CpuDense | None) -> PackedLayer:
    return packed if dense is None else packed._replace(gate_up=dense.gate_up, down=dense.down)
