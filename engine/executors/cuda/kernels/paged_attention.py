"""Attention over paged KV blocks by Triton kernels, for decode, prefill and mixed steps.

Symbols: T tokens, H query heads, G KV heads (H a multiple of G), E head size, S sequences, I tiles
of queries.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-call"

import math
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from engine.executors.cuda.kernels.attention_kernels import combine, prefill, split_context
from engine.executors.cuda.kernels.attention_launch import (
    CHUNK_LAUNCHES,
    COMBINE_LAUNCH,
    DECODE_LAUNCHES,
    LARGE_PREFILL_LAUNCHES,
    PREFILL_LAUNCHES,
    has_large_shared_memory,
    launch_for,
)
from engine.executors.cuda.kernels.kv_formats import (
    check_kv_dtype,
    kernel_view,
    kv_values_reference,
)
from engine.executors.cuda.kernels.paged_step import QUERY_TILE, PagedStep, split_queries
from memory_ops.triton_kernels.launch import on_device_of

_MAX_HEAD_DIM = 256
# tl.dot needs at least 16 rows and lanes
_LEAST = 16


def paged_attention(
    q_THE: Tensor, kv_blocks: Tensor, step: PagedStep, *, num_splits: int, out_THE: Tensor
) -> Tensor:
    """Causal grouped-query attention: ``softmax(q k^T / sqrt(E)) v``.

    Products accumulate in fp32 and the softmax is fp32; its weights are rounded to the dtype of
    ``q``. Launches depend on shapes only, so that a CUDA graph can capture them.

    Args:
        q_THE: rotated queries, fp32, bf16 or fp16, with any stride between tokens.
        kv_blocks: one layer's ``[blocks, 2, G, block_size, E]`` in the dtype of ``q``, or fp8 codes
            as uint8, with any stride between blocks. They already hold the step's own tokens.
        step: the sequences. Their numbers are not checked, because the host would have to wait for
            the device: an invalid one reads memory out of bounds.
        num_splits: programs that share the context of a sequence with at most ``split_queries``
            tokens in the step.
        out_THE: the result, in the dtype of ``q``, with any stride between tokens. Rows without a
            sequence are left as they are.

    Returns:
        ``out_THE``.

    Raises:
        ValueError: a dtype, size or stride is not supported.
    """
    _check(q_THE, kv_blocks, num_splits, out_THE)
    if q_THE.numel() and len(step.seats_S):
        with on_device_of(q_THE):
            _launch_split(q_THE, kv_blocks, step, num_splits, out_THE)
            if step.tiles_I2 is not None and len(step.tiles_I2):
                _launch_prefill(q_THE, kv_blocks, step, step.tiles_I2, out_THE)
    return out_THE


def _check(q_THE: Tensor, kv_blocks: Tensor, num_splits: int, out_THE: Tensor) -> None:
    check_kv_dtype(kv_blocks, q_THE.dtype)
    (_, num_heads, head_dim), num_kv_heads = q_THE.shape, kv_blocks.shape[2]
    if head_dim > _MAX_HEAD_DIM or kv_blocks.shape[4] != head_dim:
        raise ValueError(f"q: expected heads of {kv_blocks.shape[4]} values, at most 256")
    if num_heads % num_kv_heads:
        raise ValueError(f"q: {num_heads} heads are not a multiple of {num_kv_heads} KV heads")
    if out_THE.shape != q_THE.shape or out_THE.dtype != q_THE.dtype:
        raise ValueError(f"out: expected {q_THE.dtype} {tuple(q_THE.shape)}, like q")
    for name, tensor in ("q", q_THE), ("kv_blocks", kv_blocks), ("out", out_THE):
        if len(tensor) and not tensor[0].is_contiguous():
            raise ValueError(f"{name}: expected contiguous items, got strides {tensor.stride()}")
    if num_splits < 1:
        raise ValueError(f"num_splits: must be at least 1, not {num_splits}")


def _launch_split(
    q_THE: Tensor, kv_blocks: Tensor, step: PagedStep, num_splits: int, out_THE: Tensor
) -> None:
    num_sequences, num_kv_heads = len(step.seats_S), kv_blocks.shape[2]
    num_tokens, num_heads, head_dim = q_THE.shape
    group = num_heads // num_kv_heads
    queries = 1 if step.tiles_I2 is None else split_queries(group)
    launch = launch_for(DECODE_LAUNCHES if queries == 1 else CHUNK_LAUNCHES, q_THE)
    # per part its maximum and sum, and its weighted values; one part is the result
    shape = (num_tokens if num_splits > 1 else 0, num_heads, num_splits)
    parts = torch.empty((*shape, 2), dtype=torch.float32, device=q_THE.device)
    part_values = torch.empty((*shape, head_dim), dtype=torch.float32, device=q_THE.device)
    split_context[(num_sequences, num_kv_heads, num_splits)](
        parts_ptr=parts,
        part_values_ptr=part_values,
        **_operands(q_THE, kv_blocks, step, out_THE),
        NUM_SPLITS=num_splits,
        QUERIES=queries,
        ROWS=max(_LEAST, triton.next_power_of_2(group * queries)),
        KEYS=launch.keys,
        **launch.options(),
    )
    if num_splits > 1:
        combine[(num_sequences, num_heads)](
            parts,
            part_values,
            out_THE,
            step.query_starts_S1,
            HEAD_DIM=head_dim,
            LANES=_lanes(head_dim),
            OUT_STRIDE=out_THE.stride(0),
            NUM_SPLITS=num_splits,
            SPLITS=triton.next_power_of_2(num_splits),
            QUERIES=queries,
            AT_ONCE=COMBINE_LAUNCH.keys // queries,
            **COMBINE_LAUNCH.options(),
        )


def _launch_prefill(
    q_THE: Tensor, kv_blocks: Tensor, step: PagedStep, tiles_I2: Tensor, out_THE: Tensor
) -> None:
    num_kv_heads = kv_blocks.shape[2]
    group = q_THE.shape[1] // num_kv_heads
    is_large = has_large_shared_memory(q_THE.device)
    launch = launch_for(LARGE_PREFILL_LAUNCHES if is_large else PREFILL_LAUNCHES, q_THE)
    heads = min(triton.next_power_of_2(group), launch.most_heads)
    prefill[(num_kv_heads * triton.cdiv(group, heads), len(tiles_I2))](
        tiles_ptr=tiles_I2,
        **_operands(q_THE, kv_blocks, step, out_THE),
        QUERIES=QUERY_TILE,
        HEADS=heads,
        KEYS=launch.keys,
        **launch.options(),
    )


def _operands(q_THE: Tensor, kv_blocks: Tensor, step: PagedStep, out_THE: Tensor) -> dict[str, Any]:
    """The arguments that both kernels of attention have."""
    num_kv_heads, block_size, head_dim = kv_blocks.shape[2:]
    return {
        "q_ptr": q_THE,
        "kv_ptr": kernel_view(kv_blocks),
        "out_ptr": out_THE,
        "query_starts_ptr": step.query_starts_S1,
        "lengths_ptr": step.context_lengths_S,
        "seats_ptr": step.seats_S,
        "table_ptr": step.block_table_PB,
        # exp(x) = exp2(x * log2(e))
        "scale": math.log2(math.e) / math.sqrt(head_dim),
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": q_THE.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "LANES": _lanes(head_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_STRIDE": kv_blocks.stride(0),
        "Q_STRIDE": q_THE.stride(0),
        "OUT_STRIDE": out_THE.stride(0),
        "TABLE_STRIDE": step.block_table_PB.stride(0),
    }


def _lanes(head_dim: int) -> int:
    return int(max(_LEAST, triton.next_power_of_2(head_dim)))


def paged_attention_reference(
    q_THE: Tensor, kv_blocks: Tensor, step: PagedStep, *, num_splits: int, out_THE: Tensor
) -> Tensor:
    """Like ``paged_attention``, one sequence at a time, in fp32 or, for fp64 ``q``, in fp64."""
    dtype = torch.promote_types(q_THE.dtype, torch.float32)
    group = q_THE.shape[1] // kv_blocks.shape[2]
    lengths = step.context_lengths_S.tolist()
    for sequence, (start, end) in enumerate(pairwise(step.query_starts_S1.tolist())):
        count, length = end - start, lengths[sequence]
        ids_B = step.block_table_PB[step.seats_S[sequence], : -(-length // kv_blocks.shape[3])]
        lines_2GLE = kv_blocks[ids_B].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        lines_2HLE = kv_values_reference(lines_2GLE, dtype).repeat_interleave(group, dim=1)
        q_HQE = q_THE[start:end].to(dtype).transpose(0, 1)
        scores_HQL = q_HQE @ lines_2HLE[0].mT / math.sqrt(q_THE.shape[2])
        seen_QL = torch.ones_like(scores_HQL[0], dtype=torch.bool).tril(length - count)
        weights_HQL = scores_HQL.masked_fill(~seen_QL, -math.inf).softmax(dim=2)
        out_THE[start:end] = (weights_HQL @ lines_2HLE[1]).transpose(0, 1).to(out_THE.dtype)
    return out_THE
