"""Attention, dense feed-forward and the decoder layer that joins them."""

import torch
from torch import Tensor, nn

from engine import ops
from engine.model.config import ModelConfig
from engine.model.memory_layer import MemoryLayer, MemoryTrace
from engine.ops.layout import TokenLayout


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; parameters uninitialised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)

    def forward(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor | None,
    ) -> Tensor:
        """Return ``[T, D]``; this step's keys and values are written into ``kv_blocks``."""
        heads = (x_TD.shape[0], -1, self.head_dim)
        q_THE = ops.linear(x_TD, self.q_proj.weight, self.q_proj.bias).view(heads)
        k_TGE = ops.linear(x_TD, self.k_proj.weight, self.k_proj.bias).view(heads)
        v_TGE = ops.linear(x_TD, self.v_proj.weight, self.v_proj.bias).view(heads)
        q_THE, k_TGE = ops.rope_write(q_THE, k_TGE, v_TGE, angles, layout, kv_blocks)
        out_THE = ops.attention(q_THE, k_TGE, v_TGE, layout, kv_blocks)
        return ops.linear(out_THE.flatten(1), self.o_proj.weight, self.o_proj.bias)


class DenseFeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202); parameters uninitialised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return ``[T, D]`` in the dtype of ``x``."""
        gate_TI = ops.linear(x_TD, self.gate_proj.weight, self.gate_proj.bias)
        up_TI = ops.linear(x_TD, self.up_proj.weight, self.up_proj.bias)
        hidden_TI = ops.silu_gate(gate_TI, up_TI)
        return ops.linear(hidden_TI, self.down_proj.weight, self.down_proj.bias)


class RmsNorm(nn.Module):
    """The learned weight of an RMSNorm; uninitialised."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalise ``x``, added to the residual stream where there is one: (normed, residual)."""
        if residual_TD is None:
            return ops.rms_norm(x_TD, self.weight, self.eps), x_TD
        return ops.rms_norm_add(x_TD, residual_TD, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """One pre-norm block; its feed-forward is ``mlp`` (dense) or ``memory``, never both."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: DenseFeedForward | None = None
        self.memory: MemoryLayer | None = None
        kind = config.feed_forward[layer]
        if kind == "dense":
            self.mlp = DenseFeedForward(config)
        else:
            assert config.memory is not None  # ModelConfig checked it
            self.memory = MemoryLayer(config.memory, kind, config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor | None,
        trace: list[MemoryTrace] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (feed-forward output, residual stream); their sum is the layer's output."""
        x_TD, residual_TD = self.input_layernorm(x_TD, residual_TD)
        x_TD = self.self_attn(x_TD, layout, angles, kv_blocks)
        x_TD, residual_TD = self.post_attention_layernorm(x_TD, residual_TD)
        if self.mlp is not None:
            return self.mlp(x_TD), residual_TD
        assert self.memory is not None
        return self.memory(x_TD, trace), residual_TD
