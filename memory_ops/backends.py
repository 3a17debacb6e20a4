"""Chooses the backend of each operation by device and dtype; nothing else chooses."""

import functools
import importlib
import importlib.util
import logging
from typing import Protocol, cast

import torch
from torch import Tensor

from memory_ops import reference, row_formats
from memory_ops.checks import Table
from memory_ops.native.backend import MAX_SUBKEYS, MAX_TOP_K, NativeBackend
from memory_ops.native.library import MEMORY_LIBRARY
from memory_ops.patches.token_patches import TokenPatches
from memory_ops.row_formats import RowFormat, RowRecords
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """The operations as ``memory_ops.operations`` defines them; modules may implement it too."""

    def product_topk(self, half_scores_TH2N: Tensor, top_k: int, /) -> tuple[Tensor, Tensor]: ...
    def gather_rows(self, table: Table, rows_THK: Tensor, weights_THK: Tensor, /) -> Tensor: ...
    def row_dots(self, table: Table, rows_THK: Tensor, x_TV: Tensor, /) -> Tensor: ...
    def row_gradients(
        self, rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor, /
    ) -> tuple[Tensor, Tensor]: ...


class GroupBackend(Protocol):
    """The operations on grouped references, as ``memory_ops.operations`` defines them."""

    def group_rows(self, rows_THK: Tensor, weights_THK: Tensor, /) -> RowGroups: ...
    def squared_norm(self, groups: RowGroups, grad_TV: Tensor, /) -> float: ...
    def sparse_adam(
        self,
        table_RV: Tensor,
        moments: AdamMoments,
        groups: RowGroups,
        grad_TV: Tensor,
        step: AdamStep,
        /,
    ) -> None: ...


class PatchBackend(Protocol):
    """The sums of patches as ``memory_ops.operations`` defines them."""

    def add_patched_rows(
        self, out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: TokenPatches, /
    ) -> None: ...


class RoundingBackend(Protocol):
    """The rounding of rows as ``memory_ops.row_formats`` defines it."""

    def quantize_rows(self, values_RV: Tensor, row_format: RowFormat, /) -> RowRecords: ...


def for_topk(half_scores: Tensor, top_k: int) -> Backend:
    """The backend for these half scores."""
    shape = half_scores.shape
    fits = len(shape) == 4 and _fits_topk_kernel(shape[3], top_k)
    if half_scores.dtype is not torch.float32 or not fits:
        return REFERENCE
    return _for_device_of(half_scores)


def for_table(table: Table, other: Tensor) -> Backend:
    """The backend that reads this table for tokens on ``other``'s device.

    The devices differ if a GPU reads a pinned table in host memory.
    """
    if other.dtype is torch.float64 or not is_kernel_readable(table):
        return REFERENCE
    return _for_device_of(other)


def for_gradients(weights: Tensor, grad: Tensor) -> Backend:
    """The backend for gradients of rows."""
    if weights.dtype is torch.float64 or grad.dtype not in _KERNEL_DTYPES:
        return REFERENCE
    return _for_device_of(grad)


def for_groups(*operands: Tensor) -> GroupBackend:
    """The backend for grouped reads on one device."""
    if all(operand.dtype in _KERNEL_DTYPES for operand in operands):
        return cast(GroupBackend, _for_device_of(operands[0]))
    return cast(GroupBackend, reference)


def for_patches(sums: Tensor) -> PatchBackend:
    """The backend that adds patches to these sums."""
    backend = _for_device_of(sums) if sums.dtype is torch.float32 else REFERENCE
    return cast(PatchBackend, backend)


def for_rounding(values: Tensor) -> RoundingBackend:
    """The backend for rounding rows: kernels on the CPU, plain torch elsewhere."""
    backend = _for_device_type("cpu")
    if isinstance(backend, NativeBackend) and values.is_cpu and is_kernel_readable(values):
        return backend
    return row_formats


def is_kernel_readable(table: Table) -> bool:
    """Whether kernels can read these rows: not fp64, and each row's values contiguous."""
    if isinstance(table, RowRecords):
        return table.records_RB.stride()[1] == 1
    strides = table.stride()
    return table.dtype in _KERNEL_DTYPES and len(strides) == 2 and strides[1] == 1


def has_native_lookup(table: Table, num_subkeys: int, top_k: int) -> bool:
    """Whether native CPU kernels can run a whole lookup: choose ``top_k`` rows and read them."""
    memory = table.records_RB if isinstance(table, RowRecords) else table
    return memory.is_cpu and is_kernel_readable(table) and _fits_topk_kernel(num_subkeys, top_k)


def _fits_topk_kernel(num_subkeys: int, top_k: int) -> bool:
    return num_subkeys <= MAX_SUBKEYS and top_k <= MAX_TOP_K


_KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
REFERENCE = cast(Backend, reference)


def _for_device_of(tensor: Tensor) -> Backend:
    # reading the device's name takes longer than everything else here
    return _for_device_type("cpu" if tensor.is_cpu else tensor.device.type)


@functools.cache
def _for_device_type(device_type: str) -> Backend:
    if device_type == "cpu":
        build = MEMORY_LIBRARY.best_build
        return NativeBackend(build) if build is not None else REFERENCE
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is not None:
            return cast(Backend, importlib.import_module("memory_ops.triton_kernels"))
        logger.warning("triton is not installed: memory layers run in plain torch, much slower")
    return REFERENCE
