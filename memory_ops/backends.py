"""Which implementation of the operations runs, by device and dtype: the only place that decides."""

import functools
import importlib
import importlib.util
import logging
from typing import Protocol, cast

import torch
from torch import Tensor

from memory_ops import reference, row_formats
from memory_ops.checks import Table
from memory_ops.native.backend import MOST_CHOSEN, MOST_SUBKEYS, NativeBackend
from memory_ops.native.library import MEMORY_LIBRARY
from memory_ops.row_formats import RowFormat, RowRecords
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """The operations as ``memory_ops.reference`` defines them; a module can be one."""

    def product_topk(self, half_scores_TH2N: Tensor, top_k: int, /) -> tuple[Tensor, Tensor]: ...
    def gather_rows(self, table: Table, rows_THK: Tensor, weights_THK: Tensor, /) -> Tensor: ...
    def row_dots(self, table: Table, rows_THK: Tensor, x_TV: Tensor, /) -> Tensor: ...
    def row_gradients(
        self, rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor, /
    ) -> tuple[Tensor, Tensor]: ...


class GroupBackend(Protocol):
    """The operations on grouped references, likewise."""

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


class RoundingBackend(Protocol):
    """The rounding of rows as ``memory_ops.row_formats`` defines it."""

    def quantize_rows(self, values_RV: Tensor, row_format: RowFormat, /) -> RowRecords: ...


def for_topk(half_scores: Tensor, top_k: int) -> Backend:
    """The backend for these half scores."""
    shape = half_scores.shape
    fits = len(shape) == 4 and _can_choose(shape[3], top_k)
    if half_scores.dtype is not torch.float32 or not fits:
        return REFERENCE
    return _beside(half_scores)


def for_table(table: Table, other: Tensor) -> Backend:
    """The backend for reading this table for tokens on ``other``'s device.

    They differ where a pinned table in host memory is read from a GPU.
    """
    if other.dtype is torch.float64 or not is_fit(table):
        return REFERENCE
    return _beside(other)


def for_gradients(weights: Tensor, grad: Tensor) -> Backend:
    """The backend for gradients of rows."""
    if weights.dtype is torch.float64 or grad.dtype not in _KERNEL_DTYPES:
        return REFERENCE
    return _beside(grad)


def for_groups(*operands: Tensor) -> GroupBackend:
    """The backend for grouped references: kernels on the CPU, plain torch elsewhere."""
    if all(operand.is_cpu and operand.dtype is not torch.float64 for operand in operands):
        return cast(GroupBackend, _on("cpu"))
    return cast(GroupBackend, reference)


def for_rounding(values: Tensor) -> RoundingBackend:
    """The backend for rounding rows: kernels on the CPU, plain torch elsewhere."""
    backend = _on("cpu")
    if isinstance(backend, NativeBackend) and values.is_cpu and is_fit(values):
        return backend
    return row_formats


def is_fit(table: Table) -> bool:
    """Whether kernels can read these rows: no fp64, a row's values one after another."""
    if isinstance(table, RowRecords):
        return table.records_RB.stride()[1] == 1
    strides = table.stride()
    return table.dtype in _KERNEL_DTYPES and len(strides) == 2 and strides[1] == 1


def is_fit_for_cpu(table: Table, num_subkeys: int, top_k: int) -> bool:
    """Whether native kernels can run a whole lookup: choose so many rows, and read them here."""
    memory = table.records_RB if isinstance(table, RowRecords) else table
    return memory.is_cpu and is_fit(table) and _can_choose(num_subkeys, top_k)


def _can_choose(num_subkeys: int, top_k: int) -> bool:
    return num_subkeys <= MOST_SUBKEYS and top_k <= MOST_CHOSEN


_KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
REFERENCE = cast(Backend, reference)


def _beside(tensor: Tensor) -> Backend:
    # asking for the device's name takes longer than all the rest
    return _on("cpu") if tensor.is_cpu else _on(tensor.device.type)


@functools.cache
def _on(device_type: str) -> Backend:
    if device_type == "cpu":
        build = MEMORY_LIBRARY.best_build
        return NativeBackend(build) if build is not None else REFERENCE
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is not None:
            # where there is no triton, there is no reason to fail for want of it
            return cast(Backend, importlib.import_module("memory_ops.triton_kernels"))
        logger.warning("triton is not installed: memory layers run on plain torch, far slower")
    return REFERENCE
