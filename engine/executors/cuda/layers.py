"""Decoder layers on the GPU: attention over KV blocks, then a feed-forward, each with its norm."""

from typing import Protocol

import torch
from torch import Tensor, nn

from engine.executors.cuda.kernels.paged_attention import paged_attention
from engine.executors.cuda.kernels.rms_norm import Norm
from engine.executors.cuda.kernels.rotate_and_store import rotate_and_store
from engine.executors.cuda.memory import CudaMemory, Pieces
from engine.executors.cuda.mixture import CudaMixture
from engine.executors.cuda.products import joined, norm_of
from engine.executors.cuda.rank_products import output_product
from engine.executors.cuda.step_tokens import StepTokens
from engine.model.attention import Attention
from engine.model.feed_forward import DenseFeedForward
from engine.model.forward_trace import ForwardTrace
from engine.model.layers import DecoderLayer
from engine.model.mixture import MixtureFeedForward
from engine.model.norm import RmsNorm


class CudaFeedForward(Protocol):
    """A feed-forward of any kind, with its norm and residual sum."""

    def run(self, residual_TD: Tensor, tokens: StepTokens, trace: ForwardTrace) -> Tensor:
        """Return the new residual stream; ``residual`` may change."""
        ...


class CudaLayer:
    """One decoder layer. It shares its weights with the model's layer."""

    def __init__(self, layer: DecoderLayer, num_heads: int) -> None:
        attention = layer.self_attn
        self._num_heads = num_heads
        self._norm = norm_of(layer.input_layernorm)
        self._qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._head_norm = _head_norm(attention)
        self._out = output_product(attention.o_proj)
        norm = layer.post_attention_layernorm
        self.memory = None if layer.memory is None else CudaMemory(layer.memory, norm)
        self._feed_forward = _feed_forward(layer.feed_forward, norm)

    def pieces(
        self, residual_TD: Tensor, tokens: StepTokens, kv_blocks: Tensor, trace: ForwardTrace
    ) -> Pieces:
        """Return the new residual stream; ``kv_blocks`` are this layer's."""
        residual_TD = self._attend(residual_TD, tokens, kv_blocks)
        if self.memory is None:
            assert self._feed_forward is not None
            return self._feed_forward.run(residual_TD, tokens, trace)
        if self._feed_forward is None:
            return (yield from self.memory.pieces(residual_TD, tokens, trace))
        dense, hidden = self._feed_forward, list[Tensor]()
        assert isinstance(dense, CudaDense)

        def meanwhile() -> None:
            # before anything is added to the residual stream
            hidden.append(dense.hidden(residual_TD))

        summed_TD = yield from self.memory.pieces(residual_TD, tokens, trace, meanwhile)
        return dense.add(hidden[0], summed_TD)

    def _attend(self, residual_TD: Tensor, tokens: StepTokens, kv_blocks: Tensor) -> Tensor:
        qkv_TF = self._qkv(residual_TD, norm=self._norm)
        q_THE = rotate_and_store(
            qkv_TF,
            tokens.positions_T,
            tokens.angles,
            tokens.kv_slots_T,
            kv_blocks,
            self._num_heads,
            self._head_norm,
        )
        # rows of padding in a mixed step stay undefined; no other row reads them
        out_THE = torch.empty_like(q_THE)
        paged_attention(
            q_THE, kv_blocks, tokens.paged, num_splits=tokens.num_splits, out_THE=out_THE
        )
        return self._out(out_THE.flatten(1), residual_MO=residual_TD)


class CudaDense:
    """A ``DenseFeedForward``."""

    def __init__(self, dense: DenseFeedForward, norm: RmsNorm) -> None:
        self._norm = norm_of(norm)
        self._gate_up = joined(dense.gate_proj, dense.up_proj)
        self._down = output_product(dense.down_proj)

    def run(self, residual_TD: Tensor, tokens: StepTokens, trace: ForwardTrace) -> Tensor:
        return self.add(self.hidden(residual_TD), residual_TD)

    def hidden(self, residual_TD: Tensor) -> Tensor:
        """The values between its products, ``[T, I]``."""
        return self._gate_up(residual_TD, norm=self._norm, is_gated=True)

    def add(self, hidden_TI: Tensor, residual_TD: Tensor) -> Tensor:
        """Return the new residual stream; ``residual`` may change."""
        return self._down(hidden_TI, residual_MO=residual_TD)


def _head_norm(attention: Attention) -> Norm | None:
    query, key = attention.q_norm, attention.k_norm
    if query is None or key is None:
        return None
    return torch.stack((query.weight, key.weight)), query.eps


def _feed_forward(module: nn.Module | None, norm: RmsNorm) -> CudaFeedForward | None:
    if module is None:
        return None
    if isinstance(module, MixtureFeedForward):
        return CudaMixture(module, norm)
    assert isinstance(module, DenseFeedForward)
    return CudaDense(module, norm)
