"""Reference implementation of the operations in plain torch, for any dtype and device.

``memory_ops.operations`` documents each operation: its formula, shapes, dtypes and errors. These
functions check the same inputs, on any device; gradients come from torch.
"""

import torch
from torch import Tensor

from memory_ops.checks import (
    Table,
    accumulation_dtype,
    check_adam,
    check_gradients,
    check_groups,
    check_patches,
    check_references,
    check_rows,
    check_scores,
    check_vectors,
)
from memory_ops.patches.token_patches import TokenPatches
from memory_ops.row_formats import RowRecords, dequantize_rows
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups


def product_topk(half_scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See ``memory_ops.operations.product_topk``."""
    check_scores(half_scores_TH2N, top_k)
    num_subkeys = half_scores_TH2N.shape[3]
    # a stable sort, because torch.topk does not define the order of equal scores
    half_TH2K, subkeys_TH2K = _stable_topk(half_scores_TH2N, top_k)
    first_THK, second_THK = half_TH2K.unbind(2)
    sums_THKK = first_THK.unsqueeze(-1) + second_THK.unsqueeze(-2)
    scores_THK, ranks_THK = _stable_topk(sums_THKK.flatten(-2), top_k)
    first_subkeys_THK = subkeys_TH2K[:, :, 0].gather(-1, ranks_THK // top_k)
    second_subkeys_THK = subkeys_TH2K[:, :, 1].gather(-1, ranks_THK % top_k)
    rows_THK = first_subkeys_THK * num_subkeys + second_subkeys_THK
    no_score = scores_THK.isneginf().all(dim=-1, keepdim=True)
    weights_THK = scores_THK.masked_fill(no_score, 0.0).softmax(dim=-1)
    return rows_THK, weights_THK


def gather_rows(table: Table, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
    """See ``memory_ops.operations.gather_rows``."""
    check_rows(table, rows_THK, weights_THK)
    values_TCV = _values(table, rows_THK.flatten(1))
    weights_T1C = weights_THK.flatten(1).unsqueeze(1).to(values_TCV.dtype)
    return torch.bmm(weights_T1C, values_TCV).squeeze(1)


def add_patched_rows(
    out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: TokenPatches
) -> None:
    """See ``memory_ops.operations.add_patched_rows``."""
    check_patches(out_TV, rows_THK, weights_THK, patches)
    for number, uses in enumerate(patches.sets):
        tokens_L = (patches.set_T == number).nonzero().squeeze(1).to(out_TV.device)
        rows_LHK = rows_THK[tokens_L].contiguous()
        for patch, scale in uses:
            patch.counts[0] += rows_LHK.numel()
            if not len(patch.rows_P):
                continue
            rows_P = patch.rows_P.to(out_TV.device)
            place_LHK = torch.searchsorted(rows_P, rows_LHK).clamp(max=len(rows_P) - 1)
            found_LHK = rows_P[place_LHK] == rows_LHK
            patch.counts[1] += found_LHK.sum().to(patch.counts.device)
            weights_LHK = weights_THK[tokens_L].to(out_TV.dtype) * scale * found_LHK
            deltas_PV = patch.deltas_PV.to(out_TV)
            out_TV[tokens_L] += gather_rows(deltas_PV, place_LHK, weights_LHK)


def row_dots(table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
    """See ``memory_ops.operations.row_dots``."""
    check_vectors(table, rows_THK, x_TV)
    values_TCV = _values(table, rows_THK.flatten(1))
    return (values_TCV @ x_TV.unsqueeze(2).to(values_TCV.dtype)).view(rows_THK.shape)


def expert_lookup(
    down: Table, up: Table, rows_THK: Tensor, weights_THK: Tensor, x_TD: Tensor
) -> Tensor:
    """See ``memory_ops.operations.expert_lookup``."""
    inputs_THK = row_dots(down, rows_THK, x_TD)
    activations_THK = inputs_THK * (inputs_THK / 2**0.5).erf().add(1) / 2
    return gather_rows(up, rows_THK, weights_THK * activations_THK)


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """See ``memory_ops.operations.row_gradients``."""
    check_gradients(rows_THK, weights_THK, grad_TV)
    dtype = accumulation_dtype(grad_TV.dtype)
    if rows_THK.numel() and int(rows_THK.min()) < 0:
        raise IndexError(f"rows: {int(rows_THK.min())} is outside: row ids are not negative")
    rows_U, place_L = torch.unique(rows_THK.flatten(), return_inverse=True)
    per_token = rows_THK.shape[1] * rows_THK.shape[2]
    grad_LV = grad_TV.to(dtype).repeat_interleave(per_token, dim=0)
    grad_LV = grad_LV * weights_THK.reshape(-1, 1).to(dtype)
    sums_UV = grad_TV.new_zeros((len(rows_U), grad_TV.shape[1]), dtype=dtype)
    return rows_U, sums_UV.index_add_(0, place_L, grad_LV)


def group_rows(rows_THK: Tensor, weights_THK: Tensor) -> RowGroups:
    """See ``memory_ops.operations.group_rows``."""
    check_references(rows_THK, weights_THK)
    if rows_THK.numel() and int(rows_THK.min()) < 0:
        raise IndexError(f"rows: {int(rows_THK.min())} is outside: row ids are not negative")
    sorted_L, order_L = rows_THK.flatten().sort(stable=True)
    rows_U, counts_U = torch.unique_consecutive(sorted_L, return_counts=True)
    per_token = max(rows_THK.shape[1] * rows_THK.shape[2], 1)
    weights_L = weights_THK.to(accumulation_dtype(weights_THK.dtype)).flatten()[order_L]
    starts_U1 = torch.cat((counts_U.new_zeros(1), counts_U.cumsum(0)))
    return RowGroups(rows_U, starts_U1, order_L // per_token, weights_L)


def squared_norm(groups: RowGroups, grad_TV: Tensor) -> float:
    """See ``memory_ops.operations.squared_norm``."""
    check_groups(groups, grad_TV)
    return float(_group_sums(groups, grad_TV).detach().double().square().sum())


def sparse_adam(
    table_RV: Tensor, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor, step: AdamStep
) -> None:
    """See ``memory_ops.operations.sparse_adam``."""
    check_adam(table_RV, moments, groups, grad_TV)
    first_RV, second = moments
    rows_U = groups.rows_U
    grad_UV = _group_sums(groups, grad_TV).to(table_RV.dtype) * step.scale
    squares_UV = grad_UV.square()
    if first_RV is None:
        mean_U = squares_UV.mean(dim=1)
        second[rows_U] = step.beta2 * second[rows_U] + (1 - step.beta2) * mean_U
        table_RV[rows_U] -= step.step_size * grad_UV / (second[rows_U].sqrt() + step.eps)[:, None]
        return
    first_UV = step.beta1 * first_RV[rows_U].to(table_RV.dtype) + (1 - step.beta1) * grad_UV
    second_UV = step.beta2 * second[rows_U].to(table_RV.dtype) + (1 - step.beta2) * squares_UV
    first_RV[rows_U], second[rows_U] = first_UV.to(first_RV.dtype), second_UV.to(second.dtype)
    table_RV[rows_U] -= step.step_size * first_UV / (second_UV.sqrt() + step.eps)


def _group_sums(groups: RowGroups, grad_TV: Tensor) -> Tensor:
    """The gradient of each row, ``[U, V]``, in the accumulation dtype."""
    dtype = torch.promote_types(accumulation_dtype(grad_TV.dtype), groups.weights_L.dtype)
    grad_LV = grad_TV.to(dtype)[groups.tokens_L] * groups.weights_L.to(dtype).unsqueeze(1)
    counts_U = groups.starts_U1.diff()
    place_L = torch.repeat_interleave(torch.arange(len(counts_U), device=grad_TV.device), counts_U)
    sums_UV = grad_TV.new_zeros((len(counts_U), grad_TV.shape[1]), dtype=dtype)
    return sums_UV.index_add_(0, place_L, grad_LV)


def _values(table: Table, rows_TC: Tensor) -> Tensor:
    """The rows' values, ``[T, C, V]``, in the accumulation dtype."""
    if isinstance(table, RowRecords):
        values_LV = dequantize_rows(table, rows_TC.flatten())
        return values_LV.view(*rows_TC.shape, table.value_dim)
    values_TCV = torch.nn.functional.embedding(rows_TC, table)
    return values_TCV.to(accumulation_dtype(table.dtype))


def _stable_topk(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :top_k], indices[..., :top_k]
