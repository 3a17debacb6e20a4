"""Norms and rotation of queries and keys, and the write of keys and values, as one Triton kernel.

Symbols: T tokens, F = (H + 2 * G) * E, H query heads, G KV heads, E head size, P positions.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.executors.cuda.kernels.kv_formats import (
    check_kv_dtype,
    fp8_codes,
    fp8_codes_reference,
    kernel_view,
)
from engine.executors.cuda.kernels.rms_norm import Norm
from engine.model.norm import rms_norm
from engine.model.rotary import rotate
from memory_ops.triton_kernels.launch import on_device_of

# pairs of lanes per program, enough for loads of 128 bits per lane; not timed on a GPU
_PAIRS = 512
# no fusion, because torch rounds each product of ``rotate``
_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


def rotate_and_store(
    qkv_TF: Tensor,
    positions_T: Tensor,
    angles: tuple[Tensor, Tensor],
    kv_slots_T: Tensor,
    kv_blocks: Tensor,
    num_heads: int,
    norm: Norm | None = None,
) -> Tensor:
    """Rotate queries in place, and write rotated keys and values into their KV blocks.

    The rotation is that of ``engine.model.rotary.rotate``, bit by bit. With a norm, each head of
    queries and keys is normalised first, as ``engine.model.norm.rms_norm`` does it.

    Args:
        qkv_TF: query, key and value heads of each token, fp32, bf16 or fp16, with any row stride.
        positions_T: int64, each token's position in its sequence, less than P.
        angles: cosines and sines of all positions, contiguous fp32 ``[P, 1, E / 2]``.
        kv_slots_T: int64, each token's block id * block_size + offset in the block. Positions and
            KV slots are not checked, because the host would have to wait for the device.
        kv_blocks: one layer's ``[blocks, 2, G, block_size, E]`` in the dtype of ``qkv``, or uint8
            for fp8 codes, with any stride between blocks.
        num_heads: H.
        norm: weights ``[2, E]`` of queries and keys, and their eps, if heads are normalised.

    Returns:
        ``q_THE``, the part of ``qkv`` with the rotated queries.

    Raises:
        ValueError: a dtype, size or stride is not supported.
    """
    _check(qkv_TF, positions_T, angles, kv_slots_T, kv_blocks, num_heads)
    norm_2E, eps = norm if norm is not None else (None, 0.0)
    _check_norm(norm_2E, qkv_TF.dtype, kv_blocks.shape[4])
    num_kv_heads, block_size, head_dim = kv_blocks.shape[2:]
    num_all_heads, half = num_heads + 2 * num_kv_heads, head_dim // 2
    lanes = triton.next_power_of_2(half)
    heads = max(1, _PAIRS // lanes)
    if len(qkv_TF):
        with on_device_of(qkv_TF):
            _rotate_and_store[(len(qkv_TF), triton.cdiv(num_all_heads, heads))](
                qkv_TF,
                positions_T,
                *angles,
                kv_slots_T,
                kernel_view(kv_blocks),
                norm_2E,
                EPS=eps,
                NUM_HEADS=num_heads,
                NUM_KV_HEADS=num_kv_heads,
                HALF=half,
                BLOCK_SIZE=block_size,
                BLOCK_STRIDE=kv_blocks.stride(0),
                ROW_STRIDE=qkv_TF.stride(0),
                HEADS=heads,
                LANES=lanes,
                **_OPTIONS,
            )
    return _queries(qkv_TF, num_heads, head_dim)


def _check(
    qkv_TF: Tensor,
    positions_T: Tensor,
    angles: tuple[Tensor, Tensor],
    kv_slots_T: Tensor,
    kv_blocks: Tensor,
    num_heads: int,
) -> None:
    check_kv_dtype(kv_blocks, qkv_TF.dtype)
    num_kv_heads, _, head_dim = kv_blocks.shape[2:]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv_TF.shape[1] != width or qkv_TF.stride(1) != 1:
        found = f"{tuple(qkv_TF.shape)} with strides {qkv_TF.stride()}"
        raise ValueError(f"qkv: expected rows of {width} contiguous values, got {found}")
    if len(kv_blocks) and not kv_blocks[0].is_contiguous():
        raise ValueError(f"kv_blocks: expected contiguous blocks, got {kv_blocks.stride()}")
    for name, ids in {"positions": positions_T, "kv_slots": kv_slots_T}.items():
        if ids.shape != (len(qkv_TF),) or ids.dtype != torch.int64 or not ids.is_contiguous():
            found = f"{ids.dtype} {tuple(ids.shape)}"
            raise ValueError(f"{name}: expected a contiguous int64 [{len(qkv_TF)}], got {found}")
    shape = (len(angles[0]), 1, head_dim // 2)
    for angle in angles:
        if angle.shape != shape or angle.dtype != torch.float32 or not angle.is_contiguous():
            raise ValueError(f"angles: expected contiguous fp32 {shape}, got {tuple(angle.shape)}")


def _check_norm(norm_2E: Tensor | None, dtype: torch.dtype, head_dim: int) -> None:
    if norm_2E is None:
        return
    shape = norm_2E.shape == (2, head_dim) and norm_2E.is_contiguous()
    if not shape or norm_2E.dtype != dtype:
        found = f"{norm_2E.dtype} {tuple(norm_2E.shape)} with strides {norm_2E.stride()}"
        raise ValueError(f"norm: expected contiguous {dtype} (2, {head_dim}), got {found}")


def _queries(qkv_TF: Tensor, num_heads: int, head_dim: int) -> Tensor:
    return qkv_TF[:, : num_heads * head_dim].view(-1, num_heads, head_dim)


@triton.jit
def _weighted(x, weight_ptrs, mask, dtype: tl.constexpr):
    """Normed values times their weights, rounded like in torch after both steps."""
    weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
    return (x.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "kv_slots_ptr"])
def _rotate_and_store(
    qkv_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    kv_slots_ptr,
    kv_ptr,
    norm_ptr,
    EPS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per token and HEADS heads: queries first, then keys, then values.

    With a norm, x is x / sqrt(mean(x^2) + eps) * weight in queries and keys. Then
    (x[e], x[e + E/2]) becomes (x[e] cos - x[e + E/2] sin, x[e + E/2] cos + x[e] sin), except in
    values.
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lanes = tl.arange(0, LANES)
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (lanes < HALF)[None, :]
    places = qkv_ptr + token * ROW_STRIDE + heads[:, None] * (2 * HALF) + lanes[None, :]
    first = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=mask, other=0.0).to(tl.float32)
    rotates = (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
    if norm_ptr is not None:
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        squares = tl.sum(first * first + second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + EPS)[:, None]
        weights = norm_ptr + (heads >= NUM_HEADS)[:, None] * (2 * HALF) + lanes[None, :]
        has_norm = mask & rotates
        first = tl.where(rotates, _weighted(first * scale, weights, has_norm, dtype), first)
        second = tl.where(
            rotates, _weighted(second * scale, weights + HALF, has_norm, dtype), second
        )
    angles = tl.load(positions_ptr + token) * HALF + lanes
    cos = tl.load(cos_ptr + angles, mask=lanes < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angles, mask=lanes < HALF, other=0.0)[None, :]
    new_first = tl.where(rotates, first * cos - second * sin, first)
    new_second = tl.where(rotates, second * cos + first * sin, second)
    new_first = new_first.to(qkv_ptr.dtype.element_ty)
    new_second = new_second.to(qkv_ptr.dtype.element_ty)
    is_query = (heads < NUM_HEADS)[:, None]
    tl.store(places, new_first, mask=mask & is_query)
    tl.store(places + HALF, new_second, mask=mask & is_query)
    if kv_ptr.dtype.element_ty == tl.int8:
        new_first = fp8_codes(new_first.to(tl.float32))
        new_second = fp8_codes(new_second.to(tl.float32))
    kv_slot = tl.load(kv_slots_ptr + token)
    # the keys of all heads, then the values of all heads
    lines = (heads - NUM_HEADS) * BLOCK_SIZE + kv_slot % BLOCK_SIZE
    kv_places = kv_ptr + kv_slot // BLOCK_SIZE * BLOCK_STRIDE + lines[:, None] * (2 * HALF)
    kv_places += lanes[None, :]
    tl.store(kv_places, new_first, mask=mask & ~is_query)
    tl.store(kv_places + HALF, new_second, mask=mask & ~is_query)


def rotate_and_store_reference(
    qkv_TF: Tensor,
    positions_T: Tensor,
    angles: tuple[Tensor, Tensor],
    kv_slots_T: Tensor,
    kv_blocks: Tensor,
    num_heads: int,
    norm: Norm | None = None,
) -> Tensor:
    """Like ``rotate_and_store``, in separate steps."""
    cos, sin = (angle.index_select(0, positions_T) for angle in angles)
    num_kv_heads, block_size, head_dim = kv_blocks.shape[2:]
    q_THE = _queries(qkv_TF, num_heads, head_dim)
    kv_TGE = qkv_TF[:, num_heads * head_dim :].unflatten(1, (2 * num_kv_heads, head_dim))
    k_TGE, v_TGE = kv_TGE.chunk(2, dim=1)
    if norm is not None:
        (query_norm_E, key_norm_E), eps = norm
        q_THE.copy_(rms_norm(q_THE, query_norm_E, eps))
        k_TGE = rms_norm(k_TGE, key_norm_E, eps)
    q_THE.copy_(rotate(q_THE, (cos, sin)))
    kv_T2GE = torch.stack((rotate(k_TGE, (cos, sin)), v_TGE), dim=1)
    if kv_blocks.dtype == torch.uint8:
        kv_T2GE = fp8_codes_reference(kv_T2GE)
    kv_blocks[kv_slots_T // block_size, :, :, kv_slots_T % block_size] = kv_T2GE
    return q_THE
