"""The operations by the native library, for CPU tensors in serving."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from engine.ops.layout import PagedKv, TokenLayout
from memory_ops.native.library import NativeLibrary, use_torchs_threads

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
OPS_LIBRARY = NativeLibrary(
    Path(__file__).parent,
    {"memplus_attention": (None, (*[_POINTER] * 6, *[_INT64] * 7, ctypes.c_int32))},
    "attention runs on plain torch, many times slower",
)


class NativeOps:
    """One build of the library; each operation as its twin in plain torch defines it."""

    def __init__(self, build: str) -> None:
        """Use ``build``, one of ``OPS_LIBRARY.runnable_builds``."""
        self._library = OPS_LIBRARY.load(build)

    def attention(
        self, q_THE: Tensor, layout: TokenLayout, paged: PagedKv, kv_blocks: Tensor
    ) -> Tensor:
        """``ops.attention`` from KV blocks; fp32 or bf16, a query's heads one after another."""
        num_tokens, num_heads, head_dim = q_THE.shape
        _, _, num_kv_heads, block_size, _ = kv_blocks.shape
        assert kv_blocks.is_contiguous() and q_THE.dtype == kv_blocks.dtype
        if q_THE.stride()[1:] != (head_dim, 1):
            q_THE = q_THE.contiguous()
        out_THE = torch.empty(num_tokens, num_heads, head_dim, dtype=q_THE.dtype)
        block_table_SB = paged.block_table_SB.contiguous()
        use_torchs_threads()
        self._library.memplus_attention(
            q_THE.data_ptr(),
            kv_blocks.data_ptr(),
            block_table_SB.data_ptr(),
            layout.query_starts_S1.data_ptr(),
            paged.context_lengths_S.data_ptr(),
            out_THE.data_ptr(),
            len(paged.context_lengths),
            block_table_SB.shape[1],
            q_THE.stride()[0],
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            q_THE.dtype == torch.bfloat16,
        )
        return out_THE


def native_ops(tensor: Tensor) -> NativeOps | None:
    """The fastest build for operands like this one, if there is any for its device and dtype."""
    if tensor.is_cpu and tensor.dtype in (torch.float32, torch.bfloat16):
        return _best()
    return None


@functools.cache
def _best() -> NativeOps | None:
    build = OPS_LIBRARY.best_build
    return NativeOps(build) if build is not None else None
