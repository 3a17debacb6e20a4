"""Embedding of tokens as a Triton kernel, also of tokens that only the device knows.

Shape suffixes: T tokens, P seats (places of a sequence in a batch), V vocabulary, D model width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.executors.cuda.kernels.grouped_tiles import group_row, weight_arrays
from engine.executors.cuda.kernels.linear_operands import check_groups
from engine.model.grouped_weights import WeightGroups, dense_weights, num_groups
from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

# columns per program; not timed on a GPU
_BLOCK, _NUM_WARPS = 2048, 4


def embed(
    ids_T: Tensor,
    last_token_P: Tensor,
    embedding_VD: Tensor | WeightGroups,
    out_TD: Tensor | None = None,
) -> Tensor:
    """The embedding row of each token.

    Args:
        ids_T: int64 token ids. An id below 0 is ``-1 - seat``: the token is not yet known to the
            host, and ``last_token_P[seat]`` has it. Ids are not checked, because the host would
            have to wait for the device.
        last_token_P: int64, the token that each seat's sequence chose last.
        embedding_VD: any floating dtype, contiguous rows; or groups.
        out_TD: contiguous, receives the rows. An embedding in groups needs it: its dtype is that of
            the result.

    Returns:
        ``[T, D]``: ``out``, or a new matrix in the dtype of the embedding.

    Raises:
        ValueError: a shape, a dtype or a layout does not match.
    """
    for name, ids in {"ids": ids_T, "last_token": last_token_P}.items():
        if ids.dim() != 1 or ids.dtype != torch.int64 or not ids.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous int64 vector, got {ids.dtype} {ids.shape}"
            )
    out_TD = _checked_out(len(ids_T), embedding_VD, out_TD)
    num_tokens, width = out_TD.shape
    arrays, bits = weight_arrays(embedding_VD)
    if out_TD.numel():
        with on_device_of(out_TD):
            _embed[(num_tokens, triton.cdiv(width, _BLOCK))](
                ids_T,
                last_token_P,
                *arrays,
                out_TD,
                WIDTH=width,
                STRIDE=constant_row_stride(arrays[0]),
                GROUPS=num_groups(width),
                BITS=bits,
                BLOCK=_BLOCK,
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
    return out_TD


def _checked_out(
    num_tokens: int, embedding_VD: Tensor | WeightGroups, out_TD: Tensor | None
) -> Tensor:
    """``out``, or a new matrix; ValueError if it or the embedding does not match."""
    if isinstance(embedding_VD, WeightGroups):
        if out_TD is None:
            raise ValueError("out: required for an embedding in groups; it gives the dtype")
        check_groups("embedding", embedding_VD, (embedding_VD.num_outputs, out_TD.shape[1]))
    elif embedding_VD.dim() != 2 or embedding_VD.stride(1) != 1:
        found = f"{tuple(embedding_VD.shape)} with strides {embedding_VD.stride()}"
        raise ValueError(f"embedding: expected [V, D], rows contiguous, got {found}")
    elif out_TD is None:
        return embedding_VD.new_empty((num_tokens, embedding_VD.shape[1]))
    elif out_TD.dtype != embedding_VD.dtype or out_TD.shape[1:] != embedding_VD.shape[1:]:
        expected = f"{embedding_VD.dtype} [{num_tokens}, {embedding_VD.shape[1]}]"
        raise ValueError(f"out: expected {expected}, got {out_TD.dtype} {list(out_TD.shape)}")
    if len(out_TD) != num_tokens or not out_TD.is_contiguous():
        raise ValueError(f"out: expected {num_tokens} contiguous rows, got {list(out_TD.shape)}")
    return out_TD


@triton.jit
def _embed(
    ids_ptr,
    last_token_ptr,
    embedding_ptr,
    scales_ptr,
    minimums_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = embedding[ids[t] if ids[t] >= 0 else last_token[-1 - ids[t]]]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token)
    if row < 0:
        row = tl.load(last_token_ptr - 1 - row)
    if BITS is None:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(embedding_ptr + row * STRIDE + columns, mask=columns < WIDTH)
    else:
        groups = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        columns, values = group_row(
            embedding_ptr, scales_ptr, minimums_ptr, row, groups, GROUPS, BITS
        )
    out_ptrs = out_ptr + token * WIDTH + columns
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)


def embed_reference(
    ids_T: Tensor,
    last_token_P: Tensor,
    embedding_VD: Tensor | WeightGroups,
    out_TD: Tensor | None = None,
) -> Tensor:
    """``embed`` in plain torch."""
    known_T = torch.tensor(
        [int(i) if i >= 0 else int(last_token_P[-1 - i]) for i in ids_T], dtype=torch.int64
    )
    if isinstance(embedding_VD, WeightGroups):
        assert out_TD is not None
        rows_TD = dense_weights(embedding_VD.part(known_T), out_TD.shape[1], out_TD.dtype)
    else:
        rows_TD = embedding_VD[known_T]
    return rows_TD if out_TD is None else out_TD.copy_(rows_TD)
