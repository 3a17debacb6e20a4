"""CPU backend: the operations on the native library, with the reference's signatures."""

import torch
from torch import Tensor

from memory_ops.anonymous import uninitialized
from memory_ops.checks import (
    Table,
    check_adam,
    check_gradients,
    check_groups,
    check_patches,
    check_references,
    check_rows,
    check_scores,
    check_vectors,
)
from memory_ops.native.library import MEMORY_LIBRARY
from memory_ops.native.patches import NativePatches
from memory_ops.native.tables import FORMATS, table_arguments
from memory_ops.native.thread_team import TEAM
from memory_ops.patches.token_patches import TokenPatches
from memory_ops.row_formats import (
    RowFormat,
    RowRangeError,
    RowRecords,
    row_bytes,
    scale_offset,
)
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups

# limits of the sort in group_rows.h
_MOST_ROWS = 2**33
_MOST_REFERENCES = 2**31
MAX_TOP_K = 128
MAX_SUBKEYS = 65_536


class NativeBackend:
    """The operations of one build of the library, accumulated in fp32."""

    def __init__(self, build: str) -> None:
        """Use ``build``, one of ``MEMORY_LIBRARY.runnable_builds``."""
        self._library = MEMORY_LIBRARY.load(build)

    def product_topk(self, half_scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See ``reference.product_topk``; fp32 scores, K up to 128, N up to 65,536."""
        check_scores(half_scores_TH2N, top_k)
        num_tokens, num_heads, _, num_subkeys = half_scores_TH2N.shape
        assert half_scores_TH2N.dtype is torch.float32
        assert top_k <= MAX_TOP_K and num_subkeys <= MAX_SUBKEYS
        half_scores_TH2N = half_scores_TH2N.contiguous()
        rows_THK = _empty(num_tokens, num_heads, top_k, dtype=torch.int64)
        weights_THK = _empty(num_tokens, num_heads, top_k)
        TEAM.use_torch_thread_count()
        self._library.memplus_product_topk(
            half_scores_TH2N.data_ptr(),
            num_tokens * num_heads,
            num_subkeys,
            top_k,
            rows_THK.data_ptr(),
            weights_THK.data_ptr(),
        )
        return rows_THK, weights_THK

    def gather_rows(self, table: Table, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
        """See ``reference.gather_rows``."""
        check_rows(table, rows_THK, weights_THK)
        rows_THK = rows_THK.contiguous()
        weights_THK = weights_THK.float().contiguous()
        num_tokens, num_heads, top_k = rows_THK.shape
        arguments = table_arguments(table)
        out_TV = _empty(num_tokens, arguments[3])
        TEAM.use_torch_thread_count()
        wrong = self._library.memplus_gather_rows(
            *arguments,
            rows_THK.data_ptr(),
            weights_THK.data_ptr(),
            num_tokens,
            num_heads * top_k,
            out_TV.data_ptr(),
        )
        _raise_if_outside(wrong, rows_THK, arguments[1])
        return out_TV

    def add_patched_rows(
        self, out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: TokenPatches
    ) -> None:
        """See ``reference.add_patched_rows``; the sums are fp32 and contiguous."""
        check_patches(out_TV, rows_THK, weights_THK, patches)
        assert out_TV.dtype is torch.float32 and out_TV.is_contiguous()
        rows_THK, weights_THK = rows_THK.contiguous(), weights_THK.float().contiguous()
        native = NativePatches([patches])
        TEAM.use_torch_thread_count()
        self._library.memplus_add_patched_rows(
            native.address,
            rows_THK.data_ptr(),
            weights_THK.data_ptr(),
            len(rows_THK),
            rows_THK.shape[1] * rows_THK.shape[2],
            out_TV.data_ptr(),
            out_TV.shape[1],
        )

    def row_dots(self, table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
        """See ``reference.row_dots``."""
        check_vectors(table, rows_THK, x_TV)
        rows_THK, x_TV = rows_THK.contiguous(), x_TV.float().contiguous()
        num_tokens, num_heads, top_k = rows_THK.shape
        arguments = table_arguments(table)
        dots_THK = _empty(num_tokens, num_heads, top_k)
        TEAM.use_torch_thread_count()
        wrong = self._library.memplus_row_dots(
            *arguments,
            rows_THK.data_ptr(),
            x_TV.data_ptr(),
            num_tokens,
            num_heads * top_k,
            dots_THK.data_ptr(),
        )
        _raise_if_outside(wrong, rows_THK, arguments[1])
        return dots_THK

    def row_gradients(
        self, rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``reference.row_gradients``."""
        check_gradients(rows_THK, weights_THK, grad_TV)
        grad_TV = grad_TV.contiguous()
        groups = self.group_rows(rows_THK, weights_THK)
        # a row's gradient is a weighted sum over tokens, so the gather kernel computes it
        sums_UV = uninitialized((len(groups.rows_U), grad_TV.shape[1]), torch.float32)
        TEAM.use_torch_thread_count()
        self._library.memplus_gather_groups(
            *table_arguments(grad_TV),
            groups.tokens_L.data_ptr(),
            groups.weights_L.data_ptr(),
            groups.starts_U1.data_ptr(),
            len(groups.rows_U),
            sums_UV.data_ptr(),
        )
        return groups.rows_U.clone(), sums_UV

    def quantize_rows(self, values_RV: Tensor, row_format: RowFormat) -> RowRecords:
        """See ``row_formats.quantize_rows``."""
        num_rows, value_dim = values_RV.shape
        records_RB = uninitialized((num_rows, row_bytes(row_format, value_dim)), torch.uint8)
        records = RowRecords(records_RB, row_format, value_dim)
        TEAM.use_torch_thread_count()
        wrong = self._library.memplus_quantize_rows(
            *table_arguments(values_RV),
            records_RB.data_ptr(),
            records_RB.shape[1],
            scale_offset(row_format, value_dim),
            FORMATS[row_format],
        )
        if wrong >= 0:
            raise RowRangeError(wrong, row_format)
        return records

    def group_rows(self, rows_THK: Tensor, weights_THK: Tensor) -> RowGroups:
        """See ``reference.group_rows``; fewer than 2^31 references, row ids below 2^33."""
        check_references(rows_THK, weights_THK)
        rows_THK = rows_THK.contiguous()
        weights_THK = weights_THK.float().contiguous()
        count = rows_THK.numel()
        if count >= _MOST_REFERENCES:
            allowed = f"at most {_MOST_REFERENCES - 1} are supported"
            raise ValueError(f"rows: got {count} row ids, {allowed}")
        rows, starts, tokens = (_empty(count + 1, dtype=torch.int64) for _ in range(3))
        weights = _empty(count)
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
            _raise_if_outside(-1 - num_distinct, rows_THK, _MOST_ROWS)
        return RowGroups(rows[:num_distinct], starts[: num_distinct + 1], tokens[:count], weights)

    def squared_norm(self, groups: RowGroups, grad_TV: Tensor) -> float:
        """See ``reference.squared_norm``."""
        check_groups(groups, grad_TV)
        grad_TV = grad_TV.contiguous()
        TEAM.use_torch_thread_count()
        arguments = *table_arguments(grad_TV), *_group_arguments(groups)
        return float(self._library.memplus_squared_norm(*arguments))

    def sparse_adam(
        self,
        table_RV: Tensor,
        moments: AdamMoments,
        groups: RowGroups,
        grad_TV: Tensor,
        step: AdamStep,
    ) -> None:
        """See ``reference.sparse_adam``; an fp32 table."""
        check_adam(table_RV, moments, groups, grad_TV)
        grad_TV = grad_TV.contiguous()
        first_RV, second = moments
        TEAM.use_torch_thread_count()
        self._library.memplus_sparse_adam(
            *table_arguments(grad_TV),
            *_group_arguments(groups),
            table_RV.data_ptr(),
            None if first_RV is None else first_RV.data_ptr(),
            second.data_ptr(),
            int(second.dtype is torch.bfloat16),
            step.scale,
            step.step_size,
            step.beta1,
            step.beta2,
            step.eps,
        )


def _group_arguments(groups: RowGroups) -> tuple[int, int, int, int, int]:
    """The groups' C arguments: rows, starts, tokens, weights, number of rows."""
    parts = groups.rows_U, groups.starts_U1, groups.tokens_L, groups.weights_L
    rows, starts, tokens, weights = (part.data_ptr() for part in parts)
    return rows, starts, tokens, weights, len(groups.rows_U)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # explicitly on the CPU, because torch's default device may be another one
    return torch.empty(shape, dtype=dtype, device="cpu")


def _raise_if_outside(wrong: int, rows_THK: Tensor, num_rows: int) -> None:
    if wrong >= 0:
        raise IndexError(f"rows: {int(rows_THK.view(-1)[wrong])} is outside [0, {num_rows})")
