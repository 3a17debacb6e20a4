"""Causal grouped-query attention over a ragged batch, from KV blocks or within the batch."""

from itertools import pairwise

import torch
from torch import Tensor

from engine.ops.layout import TokenLayout
from engine.ops.native.library import native_ops


def attention(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    layout: TokenLayout,
    kv_blocks: Tensor | None,
) -> Tensor:
    """``softmax(q k^T / sqrt(E)) v`` with each token seeing its own sequence up to itself.

    H query heads, G KV heads (H a multiple of G), E head width. With ``kv_blocks``
    (``[blocks, 2, G, block_size, E]``, this step's keys and values already written) a sequence's
    context is read from its blocks; without, it is the sequence's own rows of ``k`` and ``v``.

    Returns ``[T, H, E]`` in the dtype of ``q``.
    """
    native = native_ops(q_THE)
    if native is not None and kv_blocks is not None and layout.paged is not None:
        return native.attention(q_THE, layout, layout.paged, kv_blocks)
    return attention_by_torch(q_THE, k_TGE, v_TGE, layout, kv_blocks)


def attention_by_torch(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    layout: TokenLayout,
    kv_blocks: Tensor | None,
) -> Tensor:
    """``attention`` on any device, at any precision, and with gradients."""
    out_THE = torch.empty_like(q_THE)
    for sequence, (start, end) in enumerate(pairwise(layout.query_starts)):
        if kv_blocks is not None and layout.paged is not None:
            block_ids_B = layout.paged.block_table_SB[sequence]
            length = layout.paged.context_lengths[sequence]
            keys_GLE, values_GLE = _read_blocks(kv_blocks, block_ids_B, length)
        else:
            keys_GLE = k_TGE[start:end].transpose(0, 1)
            values_GLE = v_TGE[start:end].transpose(0, 1)
        out_THE[start:end] = _attend(q_THE[start:end], keys_GLE, values_GLE)
    return out_THE


def _read_blocks(kv_blocks: Tensor, block_ids_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    count = -(-length // kv_blocks.shape[3])
    blocks_B2GSE = kv_blocks.index_select(0, block_ids_B[:count])
    lines_2GLE = blocks_B2GSE.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
    return lines_2GLE[0], lines_2GLE[1]


def _attend(q_QHE: Tensor, keys_GLE: Tensor, values_GLE: Tensor) -> Tensor:
    num_queries, length = q_QHE.shape[0], keys_GLE.shape[1]
    mask_QL = None
    if num_queries > 1:
        # query i stands at position length - num_queries + i
        mask_QL = torch.ones(num_queries, length, dtype=torch.bool, device=q_QHE.device)
        mask_QL = mask_QL.tril(length - num_queries)
    out_1HQE = torch.nn.functional.scaled_dot_product_attention(
        q_QHE.transpose(0, 1).unsqueeze(0),
        keys_GLE.unsqueeze(0),
        values_GLE.unsqueeze(0),
        attn_mask=mask_QL,
        enable_gqa=True,
    )
    return out_1HQE[0].transpose(0, 1)
