"""Calls the native CPU kernels: packed products, attention, decoder layers, token choice."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.executors.cpu.packed_head_norms import PackedHeadNorms
from engine.executors.cpu.packed_layers import PackedLayers
from engine.executors.cpu.packed_linear import PackedLinear, WeightRows
from engine.model.layout import PagedKv, TokenLayout
from engine.sampling.choice import CHOICE, Choices
from engine.sampling.log_probabilities import Scores
from engine.sampling.masks import Bitmask
from memory_ops.native.library import NativeLibrary
from memory_ops.native.patches import NativePatches
from memory_ops.native.row_fetcher import ReadFailure
from memory_ops.native.thread_team import TEAM

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
# PROGRESS_COUNTERS of progress.h, and LINE of memory_ops' simd.h
_PROGRESS_COUNTERS, _LINE = 64, 64
_LOGITS = (_POINTER, *[_INT64] * 3, _INT32)
_LAYERS = (_POINTER, _INT64, *[_POINTER] * 4, _INT64, *[_POINTER] * 3, *[_INT64] * 4, _INT32)
KV_STEP = 4  # of block sizes, and in int8 of head sizes: kv_areas.h
CPU_LIBRARY = NativeLibrary(
    Path(__file__).parent / "native",
    {
        "memplus_attention": (None, (*[_POINTER] * 9, *[_INT64] * 6, *[_INT32] * 2, _POINTER)),
        "memplus_decoder_layers": (_INT32, (*_LAYERS, *[_POINTER] * 5)),
        "memplus_panel_bytes": (_INT64, (_POINTER,)),
        "memplus_bias_size": (_INT64, (_POINTER,)),
        "memplus_pack_rows": (None, (*[_POINTER] * 2, _INT64, *[_POINTER] * 3, *[_INT64] * 4)),
        "memplus_silu_gate": (None, (_POINTER, _POINTER, _POINTER, _INT64, _INT32)),
        "memplus_linear": (None, (_POINTER, _POINTER, _INT64, _INT64, *[_POINTER] * 3)),
        "memplus_mask_logits": (None, (*_LOGITS, _POINTER, _INT64, _POINTER)),
        "memplus_sample": (None, (*_LOGITS, *[_POINTER] * 3)),
        "memplus_log_probabilities": (
            None,
            (*_LOGITS, *[_POINTER] * 2, *[_INT64] * 2, *[_POINTER] * 5),
        ),
    },
    "the model runs in plain torch, many times slower",
)


class CpuKernels:
    """The operations of one build of the library; each has a reference in plain torch."""

    def __init__(self, build: str) -> None:
        """Use ``build``, one of ``CPU_LIBRARY.runnable_builds``."""
        self.build = build
        self._library = CPU_LIBRARY.load(build)
        self._counters = np.zeros(_PROGRESS_COUNTERS * _LINE // 8, dtype=np.int64)
        self._progress: int = self._counters.ctypes.data

    @property
    def work_done(self) -> int:
        """A number that changes while a call makes progress; another thread may read it."""
        return int(self._counters.sum())

    def pack(self, rows: Sequence[WeightRows], *sizes: Any, **options: Any) -> PackedLinear:
        """Pack weights for ``linear``; see ``PackedLinear``."""
        return PackedLinear(self._library, rows, *sizes, **options)

    def linear(
        self, packed: PackedLinear, x_TI: Tensor, residual_TO: Tensor | None = None
    ) -> Tensor:
        """The packed product of ``x``, ``[T, O]``, plus the residual stream if given.

        Rows of ``x`` may be strided. An output row is the same, bit for bit, in any batch.
        """
        num_rows, row_bytes = x_TI.shape[0], x_TI.stride()[0] * x_TI.itemsize
        out_TO = torch.empty(num_rows, packed.num_outputs, dtype=packed.out_dtype)
        residual = None if residual_TO is None else residual_TO.data_ptr()
        TEAM.use_torch_thread_count()
        rows = x_TI.data_ptr(), row_bytes, num_rows
        self._library.memplus_linear(
            packed.address, *rows, residual, out_TO.data_ptr(), self._progress
        )
        return out_TO

    def attention(
        self,
        qkv_TF: Tensor,
        num_heads: int,
        angles: tuple[Tensor, Tensor],
        layout: TokenLayout,
        kv_blocks: Tensor,
        norms: PackedHeadNorms | None = None,
    ) -> Tensor:
        """Attention alone, ``[T, H E]``, after it has written keys and values.

        ``qkv`` has the queries of H heads, then the keys and values of G, ``[T, (H + 2 G) E]``.
        ``kv_blocks`` and ``angles`` are those of ``Attention.forward``; ``norms`` apply to heads.
        """
        assert layout.paged is not None
        assert qkv_TF.is_contiguous() and kv_blocks.is_contiguous()
        paged, (num_kv_heads, block_size) = layout.paged, kv_blocks.shape[2:4]
        head_dim = qkv_TF.shape[1] // (num_heads + 2 * num_kv_heads)
        out_TF = torch.empty(len(qkv_TF), num_heads * head_dim, dtype=qkv_TF.dtype)
        sequences = paged.block_table_SB, layout.query_starts_S1, paged.context_lengths_S
        TEAM.use_torch_thread_count()
        self._library.memplus_attention(
            *_addresses(qkv_TF, *angles),
            norms and norms.address,
            *_addresses(kv_blocks, *sequences, out_TF),
            *(len(paged.context_lengths), paged.block_table_SB.stride(0)),
            *(num_heads, num_kv_heads, head_dim, block_size),
            *(qkv_TF.dtype is torch.bfloat16, kv_blocks.dtype is torch.int8, self._progress),
        )
        return out_TF

    def decoder_layers(
        self,
        layers: PackedLayers,
        run: range,
        residual_TD: Tensor,
        angles: tuple[Tensor, Tensor],
        layout: TokenLayout,
        paged: PagedKv,
        kv_blocks: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run consecutive layers in place, except feed-forwards that run apart.

        ``residual`` is contiguous; the other arguments are those of ``Transformer.forward``. KV
        blocks have the dtype of the layers, or are int8 (see ``kv_memory``).
        Returns the int64 rows that the M memories of the run read, and their weights,
        ``[M, T, H, K]``, and counts them in the tables. Raises TableReadError.
        """
        cosines, sines = angles
        assert residual_TD.is_contiguous() and kv_blocks.is_contiguous()
        kv_bytes = kv_blocks.stride()[0] * kv_blocks.itemsize
        memories = layers.memories(run)
        heads, top_k = (memories[0].num_heads, memories[0].top_k) if memories else (0, 0)
        assert all((one.num_heads, one.top_k) == (heads, top_k) for one in memories)
        rows_MTHK = torch.empty(len(memories), len(residual_TD), heads, top_k, dtype=torch.int64)
        weights_MTHK = torch.empty(rows_MTHK.shape)
        failure = ReadFailure()
        for memory in memories:
            memory.source.check()
        patches = _patches(layers, run, layout)
        TEAM.use_torch_thread_count()
        sequences = paged.block_table_SB, layout.query_starts_S1, paged.context_lengths_S
        packed = layers.address(run.start), len(run)
        inputs = _addresses(residual_TD, cosines, sines)
        kv = kv_blocks.data_ptr() + run.start * kv_bytes, kv_bytes, *_addresses(*sequences)
        counts = len(paged.context_lengths), paged.block_table_SB.stride(0)
        sizes = layers.num_heads, kv_blocks.shape[4], kv_blocks.dtype is torch.int8
        addresses = *_addresses(rows_MTHK, weights_MTHK), patches and patches.address
        outputs = *addresses, ctypes.byref(failure)
        succeeded = self._library.memplus_decoder_layers(
            *packed, *inputs, *kv, *counts, *sizes, *outputs, self._progress
        )
        if not succeeded:
            raise memories[failure.memory].source.read_error(failure.row, failure.error)
        for memory in memories:
            memory.source.check()
        for memory, rows_THK in zip(memories, rows_MTHK, strict=True):
            memory.source.count(rows_THK)
        return rows_MTHK, weights_MTHK

    def silu_gate(self, gate_TI: Tensor, x_TI: Tensor) -> Tensor:
        """``silu(gate) * x`` in the gate's dtype, fp32 or bf16; ``x`` is fp32, both contiguous."""
        assert x_TI.dtype is torch.float32 and gate_TI.shape == x_TI.shape
        assert gate_TI.is_contiguous() and x_TI.is_contiguous()
        out_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype)
        TEAM.use_torch_thread_count()
        size, is_bf16 = gate_TI.numel(), gate_TI.dtype is torch.bfloat16
        self._library.memplus_silu_gate(*_addresses(gate_TI, x_TI, out_TI), size, is_bf16)
        return out_TI

    def mask(self, logits_LV: Tensor, bitmask_LW: Bitmask) -> Tensor:
        """``engine.sampling.logit_rules.masked`` for fp32 or bf16 logits."""
        assert bitmask_LW.flags.c_contiguous and len(bitmask_LW) == len(logits_LV)
        masked_LV = torch.empty(logits_LV.shape, dtype=logits_LV.dtype)
        logits_LV, logits = _logits(logits_LV)
        bits = bitmask_LW.ctypes.data, bitmask_LW.shape[1]
        self._library.memplus_mask_logits(*logits, *bits, masked_LV.data_ptr())
        return masked_LV

    def sample(self, logits_LV: Tensor, choices: Choices) -> Tensor:
        """``engine.sampling.choice.choose`` for fp32 or bf16 logits."""
        chosen_L = torch.empty(len(logits_LV), dtype=torch.int64)
        assert choices.dtype == CHOICE and choices.shape == chosen_L.shape
        choices = np.ascontiguousarray(choices)
        logits_LV, logits = _logits(logits_LV)
        at = choices.ctypes.data, chosen_L.data_ptr()
        self._library.memplus_sample(*logits, *at, self._progress)
        return chosen_L

    def log_probabilities(
        self, logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_best: int
    ) -> Scores:
        """``engine.sampling.log_probabilities.score`` for fp32 or bf16 logits."""
        at_2P = np.array([rows, token_ids], dtype=np.int64)
        assert (at_2P >= 0).all() and (at_2P.max(axis=1, initial=0) < logits_LV.shape).all()
        assert 0 <= num_best <= logits_LV.shape[1]
        count = len(rows)
        own_P, ranks_P = torch.empty(count), torch.empty(count, dtype=torch.int64)
        best_ids_PK = torch.empty(count, num_best, dtype=torch.int64)
        scores = Scores(own_P, ranks_P, best_ids_PK, torch.empty(count, num_best))
        logits_LV, logits = _logits(logits_LV)
        at = [at_P.ctypes.data for at_P in at_2P]
        self._library.memplus_log_probabilities(
            *logits, *at, count, num_best, *_addresses(*scores), self._progress
        )
        return scores


def _patches(layers: PackedLayers, run: range, layout: TokenLayout) -> NativePatches | None:
    """The patches of the tokens, for each memory of a run."""
    if layout.patches is None or not layers.memories(run):
        return None
    return NativePatches([layout.patches.at(layer) for layer in layers.memory_layers(run)])


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _logits(logits_LV: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The logits, which the caller must keep alive, and the arguments that describe them."""
    if logits_LV.stride(1) != 1:
        logits_LV = logits_LV.contiguous()
    TEAM.use_torch_thread_count()
    is_bf16 = logits_LV.dtype is torch.bfloat16
    return logits_LV, (logits_LV.data_ptr(), *logits_LV.shape, logits_LV.stride(0), is_bf16)


def cpu_kernels(device: torch.device, dtype: torch.dtype) -> CpuKernels | None:
    """The fastest runnable build for tensors of this device and dtype, or None."""
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return _best()
    return None


@functools.cache
def _best() -> CpuKernels | None:
    build = CPU_LIBRARY.best_build
    return CpuKernels(build) if build is not None else None
