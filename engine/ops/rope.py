"""Rotary position embedding, and the write of keys and values into their KV blocks."""

import torch
from torch import Tensor

from engine.ops.layout import TokenLayout


def rope_write(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    angles: tuple[Tensor, Tensor],
    layout: TokenLayout,
    kv_blocks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; where there are KV blocks, write the keys and values into them.

    H query heads, G KV heads, E head width; lane e is paired with lane e + E / 2 as in Hugging
    Face's checkpoints. ``kv_blocks`` is one layer's ``[blocks, 2, G, block_size, E]``, changed in
    place at ``layout.paged.kv_index_T``; ``None`` together with ``layout.paged``.

    Returns the rotated queries and keys, in their own dtypes.
    """
    q_THE, k_TGE = _rotate(q_THE, angles), _rotate(k_TGE, angles)
    if kv_blocks is not None and layout.paged is not None:
        block_size = kv_blocks.shape[3]
        block_T = layout.paged.kv_index_T // block_size
        offset_T = layout.paged.kv_index_T % block_size
        kv_blocks[block_T, 0, :, offset_T] = k_TGE
        kv_blocks[block_T, 1, :, offset_T] = v_TGE
    return q_THE, k_TGE


def _rotate(x_THE: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = angles
    first, second = x_THE.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_THE.dtype)
