"""Decoder layers with packed weights, and feed-forwards that run outside the native call."""

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from engine.executors.cpu.memory import CpuMemory
from engine.executors.cpu.mixture import CpuMixture
from engine.executors.cpu.packed_layers import PackedLayer
from engine.executors.cpu.packing import Packer
from engine.model.feed_forward import DenseFeedForward
from engine.model.forward_trace import ForwardTrace
from engine.model.layers import DecoderLayer
from engine.model.memory_layer import MemoryLayer
from engine.model.mixture import MixtureFeedForward
from engine.model.norm import RmsNorm
from engine.model.row_patches import ForwardPatches


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
class CpuLayer:
    """One decoder layer.

    Attributes:
        packed: the layer in native form, without a feed-forward that the kernels cannot run.
        memory: the layer's memory, if it has one, in native form or not.
        other: any other feed-forward that runs apart.
    """

    packed: PackedLayer
    memory: CpuMemory | None = None
    other: CpuMixture | EagerFeedForward | None = None

    @property
    def is_apart(self) -> bool:
        """Whether the feed-forward runs outside the native call."""
        return self.packed.gate_up is None and self.packed.memory is None

    def run_apart(
        self, residual_TD: Tensor, trace: ForwardTrace | None, patches: ForwardPatches | None
    ) -> Tensor:
        """Run the feed-forward outside the native call; return the new residual stream."""
        feed_forward = self.other or self.memory
        assert feed_forward is not None
        return feed_forward.run(residual_TD, trace, patches)


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
    if isinstance(feed_forward, DenseFeedForward):
        gate_up = packer.linear(
            feed_forward.gate_proj, feed_forward.up_proj, norm=norm, is_gated=True
        )
        down = packer.linear(feed_forward.down_proj)
        return CpuLayer(packed._replace(gate_up=gate_up, down=down))
    if isinstance(feed_forward, MixtureFeedForward):
        return CpuLayer(packed, other=CpuMixture(packer, feed_forward, norm))
    if isinstance(feed_forward, MemoryLayer):
        memory = CpuMemory(packer, feed_forward, norm)
        return CpuLayer(packed._replace(memory=memory.packed()), memory=memory)
    # a copy, which shares no weights with the model
    module = copy.deepcopy(feed_forward).to(packer.dtype)
    return CpuLayer(packed, other=EagerFeedForward(packer.norm(norm), module))
