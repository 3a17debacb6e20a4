"""Embedding of tokens as a Triton kernel, also of tokens that only the device knows.

Shape suffixes: T tokens, P seats (places of a sequence in a batch), V vocabulary, D model width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

# columns per program; not timed on a GPU
_BLOCK, _NUM_WARPS = 2048, 4


def embed(ids_T: Tensor, last_token_P: Tensor, embedding_VD: Tensor) -> Tensor:
    """The embedding row of each token.

    Args:
        ids_T: int64 token ids. An id below 0 is ``-1 - seat``: the token is not yet known to the
            host, and ``last_token_P[seat]`` has it. Ids are not checked, because the host would
            have to wait for the device.
        last_token_P: int64, the token that each seat's sequence chose last.
        embedding_VD: any floating dtype, contiguous rows.

    Returns:
        ``[T, D]`` in the dtype of the embedding.

    Raises:
        ValueError: a dtype or a layout does not match.
    """
    for name, ids in {"ids": ids_T, "last_token": last_token_P}.items():
        if ids.dim() != 1 or ids.dtype != torch.int64 or not ids.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous int64 vector, got {ids.dtype} {ids.shape}"
            )
    if embedding_VD.dim() != 2 or embedding_VD.stride(1) != 1:
        found = f"{tuple(embedding_VD.shape)} with strides {embedding_VD.stride()}"
        raise ValueError(f"embedding: expected [V, D], rows contiguous, got {found}")
    num_tokens, width = len(ids_T), embedding_VD.shape[1]
    out_TD = torch.empty((num_tokens, width), dtype=embedding_VD.dtype, device=ids_T.device)
    if out_TD.numel():
        with on_device_of(out_TD):
            _embed[(num_tokens, triton.cdiv(width, _BLOCK))](
                ids_T,
                last_token_P,
                embedding_VD,
                out_TD,
                WIDTH=width,
                STRIDE=constant_row_stride(embedding_VD),
                BLOCK=_BLOCK,
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
    return out_TD


@triton.jit
def _embed(
    ids_ptr,
    last_token_ptr,
    embedding_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = embedding[ids[t] if ids[t] >= 0 else last_token[-1 - ids[t]]]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token)
    if row < 0:
        row = tl.load(last_token_ptr - 1 - row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < WIDTH
    values = tl.load(embedding_ptr + row * STRIDE + columns, mask=live)
    tl.store(out_ptr + token * WIDTH + columns, values, mask=live)


def embed_reference(ids_T: Tensor, last_token_P: Tensor, embedding_VD: Tensor) -> Tensor:
    """``embed`` in plain torch."""
    known_T = [int(i) if i >= 0 else int(last_token_P[-1 - i]) for i in ids_T]
    return embedding_VD[torch.tensor(known_T, dtype=torch.int64)]
