"""Causal grouped-query attention with rotary positions over a ragged batch.

Symbols: T tokens, D model width, H query heads, G KV heads (H a multiple of G), E head width.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from engine.model.config import KV_SCALE_BYTES, ModelConfig
from engine.model.layout import TokenLayout
from engine.model.norm import RmsNorm
from engine.model.rotary import rotate
from engine.model.uninitialised import Linear
from memory_ops.anonymous import anonymous_zeros


class Attention(nn.Module):
    """Query, key and value projections, attention, output projection; uninitialised.

    ``q_norm`` and ``k_norm`` normalise each head, if the model has them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(width, query_size, bias=bias)
        self.k_proj = Linear(width, kv_size, bias=bias)
        self.v_proj = Linear(width, kv_size, bias=bias)
        self.o_proj = Linear(query_size, width, bias=config.attention_bias)
        self.q_norm = RmsNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RmsNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        angles: tuple[Tensor, Tensor],
        kv_blocks: Tensor | None,
    ) -> Tensor:
        """Return ``[T, D]``; write keys and values into ``kv_blocks`` if given.

        ``angles`` are cosines and sines ``[T, 1, E / 2]``. ``kv_blocks`` is this layer's
        ``[blocks, 2, G, block_size, E]``, given if and only if ``layout.paged`` is.
        """
        q_THE, k_TGE = self._heads(self.q_proj(x_TD)), self._heads(self.k_proj(x_TD))
        if self.q_norm is not None and self.k_norm is not None:
            q_THE, k_TGE = self.q_norm(q_THE), self.k_norm(k_TGE)
        q_THE, k_TGE = rotate(q_THE, angles), rotate(k_TGE, angles)
        v_TGE = self._heads(self.v_proj(x_TD))
        if kv_blocks is not None:
            write_kv(k_TGE, v_TGE, layout, kv_blocks)
        out_TD: Tensor = self.o_proj(attend(q_THE, k_TGE, v_TGE, layout, kv_blocks).flatten(1))
        return out_TD

    def _heads(self, x_TF: Tensor) -> Tensor:
        # torch cannot infer a size if there are no tokens
        return torch.unflatten(x_TF, 1, (x_TF.shape[1] // self.head_dim, self.head_dim))


class KvMemoryError(MemoryError):
    """The device does not have the memory for the KV blocks."""


def kv_memory(config: ModelConfig, num_blocks: int, block_size: int, like: Tensor) -> Tensor:
    """Zeros ``[layers, blocks, 2, G, block_size, E]`` on the device and in the dtype of ``like``.

    In int8 there are 4 more bytes per key and value, for a scale. The CPU kernels use the memory of
    a block in the layout of kv_areas.h.

    On a CPU, blocks occupy memory from their first write on; KvMemoryError if there is too little.
    """
    width = config.head_dim + (KV_SCALE_BYTES if like.dtype is torch.int8 else 0)
    shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size, width)
    try:
        if like.device.type == "cpu":
            return anonymous_zeros(shape, like.dtype)
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    except (OSError, OverflowError, torch.OutOfMemoryError) as error:
        raise KvMemoryError(str(error)) from error


def write_kv(k_TGE: Tensor, v_TGE: Tensor, layout: TokenLayout, kv_blocks: Tensor) -> None:
    """Write one layer's keys and values at ``layout.paged.kv_index_T`` into its blocks."""
    assert layout.paged is not None
    block_size = kv_blocks.shape[3]
    block_T = layout.paged.kv_index_T // block_size
    offset_T = layout.paged.kv_index_T % block_size
    kv_blocks[block_T, 0, :, offset_T] = k_TGE
    kv_blocks[block_T, 1, :, offset_T] = v_TGE


def attend(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: TokenLayout, kv_blocks: Tensor | None
) -> Tensor:
    """``softmax(q k^T / sqrt(E)) v``, ``[T, H, E]`` in the dtype of ``q``, causal per sequence.

    With ``kv_blocks``, which already hold this step's keys and values, a sequence's context is
    read from its blocks; without, it is the sequence's own rows of ``k`` and ``v``.
    """
    if kv_blocks is None or layout.paged is None:
        return _attend_whole(q_THE, k_TGE, v_TGE, layout)
    out_THE = torch.empty_like(q_THE)
    for sequence, (start, end) in enumerate(pairwise(layout.query_starts)):
        block_ids_B = layout.paged.block_table_SB[sequence]
        length = layout.paged.context_lengths[sequence]
        keys_GLE, values_GLE = _read_blocks(kv_blocks, block_ids_B, length)
        out_THE[start:end] = _attend_one(q_THE[start:end], keys_GLE, values_GLE)
    return out_THE


def _attend_whole(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: TokenLayout) -> Tensor:
    if not q_THE.shape[0]:
        return torch.empty_like(q_THE)
    groups, outs = layout.groups, []
    spread = (groups.spread(x_TGE.flatten(1)) for x_TGE in (q_THE, k_TGE, v_TGE))
    for q_SLF, k_SLF, v_SLF in zip(*spread, strict=True):
        q_SHLE, k_SGLE, v_SGLE = (
            x_SLF.unflatten(2, (-1, q_THE.shape[2])).transpose(1, 2)
            for x_SLF in (q_SLF, k_SLF, v_SLF)
        )
        # tokens do not attend to the padding behind their sequence's end
        out_SHLE = scaled_dot_product_attention(
            q_SHLE, k_SGLE, v_SGLE, is_causal=True, enable_gqa=True
        )
        outs.append(out_SHLE.transpose(1, 2).flatten(2))
    return groups.gather(outs).view_as(q_THE)


def _read_blocks(kv_blocks: Tensor, block_ids_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    count = -(-length // kv_blocks.shape[3])
    blocks_B2GSE = kv_blocks.index_select(0, block_ids_B[:count])
    lines_2GLE = blocks_B2GSE.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
    return lines_2GLE[0], lines_2GLE[1]


def _attend_one(q_QHE: Tensor, keys_GLE: Tensor, values_GLE: Tensor) -> Tensor:
    num_queries, length = q_QHE.shape[0], keys_GLE.shape[1]
    mask_QL = None
    if num_queries > 1:
        # query i has position length - num_queries + i
        mask_QL = torch.ones(num_queries, length, dtype=torch.bool, device=q_QHE.device)
        mask_QL = mask_QL.tril(length - num_queries)
    out_1HQE = scaled_dot_product_attention(
        q_QHE.transpose(0, 1).unsqueeze(0),
        keys_GLE.unsqueeze(0),
        values_GLE.unsqueeze(0),
        attn_mask=mask_QL,
        enable_gqa=True,
    )
    return out_1HQE[0].transpose(0, 1)
