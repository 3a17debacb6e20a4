"""The shortest way to the native kernels: for plain CPU tensors that lie as kernels read them."""

import ctypes
import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from memory_ops.checks import Table
from memory_ops.native.backend import FORMATS, MOST_CHOSEN, MOST_SUBKEYS
from memory_ops.native.library import MEMORY_LIBRARY, use_torchs_threads
from memory_ops.row_formats import RowFormat, RowRecords, scale_offset

_MOST = (MOST_SUBKEYS, MOST_CHOSEN)


class DirectCalls:
    """Two operations by one build of the library, with the reference's signatures.

    They return ``None`` for whatever needs a check, a conversion, a gradient or another backend.
    """

    def __init__(self, module: ModuleType, build: str) -> None:
        """Call the kernels of ``build`` by ``module``, made of direct_calls.cpp."""
        library = MEMORY_LIBRARY.load(build)
        self._gather_rows, self._product_topk = module.gather_rows, module.product_topk
        self._gather_kernel = _address(library, "memplus_gather_rows")
        self._topk_kernel = _address(library, "memplus_product_topk")

    def product_topk(self, half_scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor] | None:
        """See ``reference.product_topk``."""
        use_torchs_threads()
        needs_grad = torch.is_grad_enabled()
        chosen: tuple[Tensor, Tensor] | None = self._product_topk(
            self._topk_kernel, needs_grad, _MOST, half_scores_TH2N, top_k
        )
        return chosen

    def gather_rows(self, table: Table, rows_THK: Tensor, weights_THK: Tensor) -> Tensor | None:
        """See ``reference.gather_rows``; raises IndexError for a row outside the table."""
        memory, record = table, None
        if isinstance(table, RowRecords):
            memory, record = table.records_RB, _record(table.row_format, table.value_dim)
        use_torchs_threads()
        needs_grad = torch.is_grad_enabled()
        out_TV: Tensor | None = self._gather_rows(
            self._gather_kernel, needs_grad, record, memory, rows_THK, weights_THK
        )
        return out_TV


def direct_calls(build: str) -> DirectCalls | None:
    """Those of a build, unless Python's headers were missing or this torch cannot exchange."""
    try:
        module = importlib.import_module("memory_ops.native.direct_calls")
    except ImportError:
        return None
    return DirectCalls(module, build)


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value


@functools.cache
def _record(row_format: RowFormat, value_dim: int) -> tuple[int, int, int]:
    return FORMATS[row_format], value_dim, scale_offset(row_format, value_dim)
