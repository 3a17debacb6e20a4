"""Attention, dense feed-forward and the decoder layer that joins them."""

from torch import Tensor, nn

from engine import ops
from engine.model.config import ModelConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.memory_layer import MemoryLayer
from engine.model.mixture import MixtureFeedForward
from engine.model.norm import RmsNorm
from engine.model.uninitialised import Linear
from engine.ops.layout import TokenLayout
from engine.ops.native.library import NativeOps
from engine.ops.native.packed_layers import LayerProducts


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; parameters uninitialised."""

    def __init__(self, config: ModelConfig, norm: RmsNorm) -> None:
        """``norm``, the decoder layer's own, is applied to what comes in."""
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=bias)
        self.qkv = ops.Projection(self.q_proj, self.k_proj, self.v_proj, norm=norm)
        self.out = ops.Projection(self.o_proj)

    def forward(
        self,
        residual_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor | None,
    ) -> Tensor:
        """Return the new residual stream; keys and values are written into ``kv_blocks``."""
        qkv_TF = ops.linear(residual_TD, self.qkv)
        out_TF = ops.attention(qkv_TF, self.num_heads, self.num_kv_heads, angles, layout, kv_blocks)
        return ops.linear(out_TF, self.out, residual_TD)


class DenseFeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202); parameters uninitialised."""

    def __init__(self, config: ModelConfig, norm: RmsNorm) -> None:
        """``norm``, the decoder layer's own, is applied to what comes in."""
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(config.hidden_size, size, bias=bias)
        self.up_proj = Linear(config.hidden_size, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)
        self.gate_up = ops.Projection(self.gate_proj, self.up_proj, norm=norm, is_gated=True)
        self.down = ops.Projection(self.down_proj)

    def forward(self, residual_TD: Tensor) -> Tensor:
        """Return the new residual stream."""
        return ops.linear(ops.linear(residual_TD, self.gate_up), self.down, residual_TD)


class DecoderLayer(nn.Module):
    """One pre-norm block; its feed-forward is one of ``mlp``, ``block_sparse_moe``, ``memory``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, self.input_layernorm)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: DenseFeedForward | None = None
        self.block_sparse_moe: MixtureFeedForward | None = None
        self.memory: MemoryLayer | None = None
        kind = config.feed_forward[layer]
        if kind == "dense":
            self.mlp = DenseFeedForward(config, self.post_attention_layernorm)
        elif kind == "moe":
            assert config.mixture is not None  # ModelConfig checked it
            self.block_sparse_moe = MixtureFeedForward(
                config.mixture, config.hidden_size, self.post_attention_layernorm
            )
        else:
            assert config.memory is not None  # ModelConfig checked it
            self.memory = MemoryLayer(
                config.memory,
                kind,
                config.hidden_size,
                config.rms_norm_eps,
                self.post_attention_layernorm,
                layer,
            )

    def pack(self, native: NativeOps) -> LayerProducts:
        """Lay the weights out for serving; see ``Projection.pack``."""
        attention = self.self_attn.qkv.pack(native), self.self_attn.out.pack(native)
        if self.mlp is not None:
            mlp = self.mlp
            return LayerProducts(*attention, mlp.gate_up.pack(native), mlp.down.pack(native))
        if self.block_sparse_moe is not None:
            self.block_sparse_moe.pack(native)
            return LayerProducts(*attention)
        assert self.memory is not None
        return LayerProducts(*attention, memory=self.memory.pack(native))

    def forward(
        self,
        residual_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor | None,
        trace: ForwardTrace | None,
    ) -> Tensor:
        """Return the new residual stream."""
        residual_TD = self.self_attn(residual_TD, layout, angles, kv_blocks)
        return self.feed_forward(residual_TD, trace)

    def feed_forward(self, residual_TD: Tensor, trace: ForwardTrace | None) -> Tensor:
        """Return the new residual stream, after the layer's second half."""
        if self.mlp is not None:
            return self.mlp(residual_TD)  # type: ignore[no-any-return]
        if self.block_sparse_moe is not None:
            return self.block_sparse_moe(residual_TD, trace)  # type: ignore[no-any-return]
        assert self.memory is not None
        return self.memory(residual_TD, trace, residual_TD)  # type: ignore[no-any-return]
