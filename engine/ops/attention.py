"""Causal grouped-query attention with rotary positions over a ragged batch."""

from itertools import pairwise

import torch
from torch import Tensor

from engine.ops.layout import TokenLayout
from engine.ops.native.library import native_ops
from engine.ops.rope import rope_write


def attention(
    qkv_TF: Tensor,
    num_heads: int,
    num_kv_heads: int,
    angles: tuple[Tensor, Tensor],
    layout: TokenLayout,
    kv_blocks: Tensor | None,
) -> Tensor:
    """Rotate queries and keys, write keys and values into their blocks, and attend.

    H query heads, G KV heads (H a multiple of G), E head width. ``qkv`` is ``[T, (H + 2 G) E]``,
    queries, keys and values one after another; ``angles`` are cosines and sines ``[T, 1, E / 2]``.
    ``kv_blocks`` is one layer's ``[blocks, 2, G, block_size, E]``, changed in place; ``None``
    together with ``layout.paged``: then a sequence's context is its own rows of ``qkv``.

    Returns ``[T, H E]`` in the dtype of ``qkv``.
    """
    native = native_ops(qkv_TF.device, qkv_TF.dtype)
    if native is not None and kv_blocks is not None and layout.paged is not None:
        return native.attention(qkv_TF, num_heads, angles, layout, layout.paged, kv_blocks)
    return attention_by_torch(qkv_TF, num_heads, num_kv_heads, angles, layout, kv_blocks)


def attention_by_torch(
    qkv_TF: Tensor,
    num_heads: int,
    num_kv_heads: int,
    angles: tuple[Tensor, Tensor],
    layout: TokenLayout,
    kv_blocks: Tensor | None,
) -> Tensor:
    """``attention`` on any device, at any precision, and with gradients."""
    heads = num_heads + 2 * num_kv_heads
    # E is said, since there may be no tokens
    qkv_TFE = qkv_TF.view(qkv_TF.shape[0], heads, qkv_TF.shape[1] // heads)
    q_THE, k_TGE, v_TGE = torch.split(qkv_TFE, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    q_THE, k_TGE = rope_write(q_THE, k_TGE, v_TGE, angles, layout, kv_blocks)
    return attend(q_THE, k_TGE, v_TGE, layout, kv_blocks).flatten(1)


def attend(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    layout: TokenLayout,
    kv_blocks: Tensor | None,
) -> Tensor:
    """``softmax(q k^T / sqrt(E)) v`` with each token seeing its own sequence up to itself.

    With ``kv_blocks``, this step's keys and values already written, a sequence's context is read
    from its blocks; without, it is the sequence's own rows of ``k`` and ``v``.

    Returns ``[T, H, E]`` in the dtype of ``q``.
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
        # what stands behind a sequence's end is seen by nothing that is kept
        out_SHLE = torch.nn.functional.scaled_dot_product_attention(
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
