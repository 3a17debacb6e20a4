"""The operations by the native library, with the reference's signatures, for CPU tensors."""

import ctypes
import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memory_ops.anonymous import unwritten
from memory_ops.checks import Table, check_gradients, check_rows, check_scores, check_vectors
from memory_ops.native.library import MEMORY_LIBRARY, use_torchs_threads
from memory_ops.row_formats import RowFormat, RowRecords, scale_offset

# the codes of row_table.h
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FORMATS = {"int8": 3, "fp8": 4, "int4": 5}
# as many as group_rows.h can sort by
_MOST_ROWS = 2**33
_MOST_REFERENCES = 2**31
MOST_CHOSEN = 128
MOST_SUBKEYS = 65_536


class NativeBackend:
    """One build of the library. Sums are taken in fp32; see ``memory_ops.reference``."""

    def __init__(self, build: str) -> None:
        """Use ``build``, one of ``MEMORY_LIBRARY.runnable_builds``."""
        self._library = MEMORY_LIBRARY.load(build)
        self._direct = _direct_calls()
        self._product_topk = _address(self._library.memplus_product_topk)
        self._gather_rows = _address(self._library.memplus_gather_rows)

    def product_topk(self, half_scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See ``reference.product_topk``; fp32, K to 128, N to 65,536."""
        shape = half_scores_TH2N.shape
        assert top_k <= MOST_CHOSEN and shape[-1] <= MOST_SUBKEYS
        if self._direct is not None and len(shape) == 4 and top_k > 0:
            chosen = _empty_choice(shape[0], shape[1], top_k)
            use_torchs_threads()
            if self._direct.product_topk(self._product_topk, half_scores_TH2N, *chosen):
                return chosen
        check_scores(half_scores_TH2N, top_k)
        assert half_scores_TH2N.dtype is torch.float32
        half_scores_TH2N = half_scores_TH2N.contiguous()
        rows_THK, weights_THK = _empty_choice(shape[0], shape[1], top_k)
        use_torchs_threads()
        self._library.memplus_product_topk(
            half_scores_TH2N.data_ptr(),
            shape[0] * shape[1],
            shape[3],
            top_k,
            rows_THK.data_ptr(),
            weights_THK.data_ptr(),
        )
        return rows_THK, weights_THK

    def gather_rows(self, table: Table, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
        """See ``reference.gather_rows``."""
        if self._direct is not None:
            memory, value_dim, record = _memory(table)
            out_TV = torch.empty(rows_THK.shape[0], value_dim)
            use_torchs_threads()
            if self._direct.gather_rows(
                self._gather_rows, record, memory, rows_THK, weights_THK, out_TV
            ):
                return out_TV
        check_rows(table, rows_THK, weights_THK)
        rows_THK = rows_THK.contiguous()
        weights_THK = weights_THK.float().contiguous()
        num_tokens, num_heads, top_k = rows_THK.shape
        arguments = _table_arguments(table)
        out_TV = torch.empty(num_tokens, arguments[3])
        use_torchs_threads()
        wrong = self._library.memplus_gather_rows(
            *arguments,
            rows_THK.data_ptr(),
            weights_THK.data_ptr(),
            num_tokens,
            num_heads * top_k,
            out_TV.data_ptr(),
        )
        _check_place(wrong, rows_THK, arguments[1])
        return out_TV

    def row_dots(self, table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
        """See ``reference.row_dots``."""
        check_vectors(table, rows_THK, x_TV)
        rows_THK, x_TV = rows_THK.contiguous(), x_TV.float().contiguous()
        num_tokens, num_heads, top_k = rows_THK.shape
        arguments = _table_arguments(table)
        dots_THK = torch.empty(num_tokens, num_heads, top_k)
        use_torchs_threads()
        wrong = self._library.memplus_row_dots(
            *arguments,
            rows_THK.data_ptr(),
            x_TV.data_ptr(),
            num_tokens,
            num_heads * top_k,
            dots_THK.data_ptr(),
        )
        _check_place(wrong, rows_THK, arguments[1])
        return dots_THK

    def row_gradients(
        self, rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``reference.row_gradients``."""
        check_gradients(rows_THK, weights_THK, grad_TV)
        rows_THK, grad_TV = rows_THK.contiguous(), grad_TV.contiguous()
        weights_THK = weights_THK.float().contiguous()
        count, value_dim = rows_THK.numel(), grad_TV.shape[1]
        if count >= _MOST_REFERENCES:
            raise ValueError(f"rows: {count} are too many, at most {_MOST_REFERENCES - 1}")
        rows, starts, tokens = (torch.empty(count + 1, dtype=torch.int64) for _ in range(3))
        weights = torch.empty(count)
        num_distinct = self._library.memplus_group_rows(
            rows_THK.data_ptr(),
            weights_THK.data_ptr(),
            count,
            max(rows_THK.shape[1] * rows_THK.shape[2], 1),
            rows.data_ptr(),
            starts.data_ptr(),
            tokens.data_ptr(),
            weights.data_ptr(),
        )
        if num_distinct < 0:
            _check_place(-1 - num_distinct, rows_THK, _MOST_ROWS)
        # the sum over the tokens that read a row is a gather once more
        sums_UV = unwritten((num_distinct, value_dim), torch.float32)
        use_torchs_threads()
        self._library.memplus_gather_groups(
            *_table_arguments(grad_TV),
            tokens.data_ptr(),
            weights.data_ptr(),
            starts.data_ptr(),
            num_distinct,
            sums_UV.data_ptr(),
        )
        return rows[:num_distinct].clone(), sums_UV


def _direct_calls() -> ModuleType | None:
    """direct_calls.cpp, where there were Python's headers to build it and torch can exchange."""
    try:
        return importlib.import_module("memory_ops.native.direct_calls")
    except (ImportError, AttributeError):
        return None


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _empty_choice(num_tokens: int, num_heads: int, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (num_tokens, num_heads, top_k)
    return torch.empty(shape, dtype=torch.int64), torch.empty(shape)


def _memory(table: Table) -> tuple[Tensor, int, tuple[int, int, int] | None]:
    """The tensor that holds the rows, V, and of records what ``_record`` says."""
    if isinstance(table, RowRecords):
        return table.records_RB, table.value_dim, _record(table.row_format, table.value_dim)
    return table, table.shape[1], None


@functools.cache
def _record(row_format: RowFormat, value_dim: int) -> tuple[int, int, int]:
    """Format, value_dim, scale_offset."""
    return _FORMATS[row_format], value_dim, scale_offset(row_format, value_dim)


def _table_arguments(table: Table) -> tuple[int, int, int, int, int, int]:
    """data, num_rows, row_stride in bytes, value_dim, scale_offset, format."""
    memory, value_dim, record = _memory(table)
    assert memory.stride()[1] == 1
    code, _, offset = (_DTYPES[memory.dtype], value_dim, 0) if record is None else record
    stride = memory.stride()[0] * memory.itemsize
    return memory.data_ptr(), memory.shape[0], stride, value_dim, offset, code


def _check_place(wrong: int, rows_THK: Tensor, num_rows: int) -> None:
    if wrong >= 0:
        raise IndexError(f"rows: {int(rows_THK.view(-1)[wrong])} is outside [0, {num_rows})")
