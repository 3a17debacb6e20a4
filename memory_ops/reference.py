"""Reference implementation of the operations in plain torch, for any dtype and device.

Shape suffixes: T tokens, H memory heads, N subkeys per half, K rows read per head, R = N * N rows,
V value width. The formulas are those of "Memory Layers at Scale" (arXiv 2412.09764) and "Large
Memory Layers with Product Keys" (arXiv 1907.05242).
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
    """Choose each head's ``top_k`` best rows among all N * N sums of two half scores.

        I1, I2 = top-K of s1, top-K of s2;  rows = top-K of s1[i] + s2[j];  row id = i * N + j
        weights = softmax(scores of the chosen rows)

    Equal half scores go to the smaller subkey, equal sums to the smaller rank in the first half,
    then in the second. A head whose scores are all -inf gets uniform weights.

    Args:
        half_scores_TH2N: scores of both halves, fp32 (or fp64), ``[T, H, 2, N]``.
        top_k: K, from 1 to N.

    Returns:
        ``rows_THK`` int64 in [0, N * N) and ``weights_THK`` in the scores' dtype, both
        ``[T, H, K]``, best row first.

    Raises:
        ValueError: the scores have another shape, or ``top_k`` lies outside [1, N].
    """
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
    """Sum weighted table rows over heads and choices: ``out[t] = sum_hk w[t,h,k] * table[row]``.

    Args:
        table: the value table, ``[R, V]`` of any floating dtype, or records.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R).
        weights_THK: one weight per row, floating, ``[T, H, K]``.

    Returns:
        ``out_TV``, ``[T, V]``, accumulated and returned in fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: rows and weights differ in shape, or the table is not a matrix.
        IndexError: a row id lies outside the table.
    """
    check_rows(table, rows_THK, weights_THK)
    values_TCV = _values(table, rows_THK.flatten(1))
    weights_T1C = weights_THK.flatten(1).unsqueeze(1).to(values_TCV.dtype)
    return torch.bmm(weights_T1C, values_TCV).squeeze(1)


def add_patched_rows(
    out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: TokenPatches
) -> None:
    """Add to each token's sum what its patches add to the rows that it reads, in place.

        out[t] += sum over the patches of t, over h, k: scale * w[t,h,k] * delta[row[t,h,k]]

    Rows that a patch does not have add nothing. Tokens without patches do not change. The patches
    count the rows read and found.

    Args:
        out_TV: the sums of ``gather_rows``, fp32 or fp64, ``[T, V]``.
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, floating, ``[T, H, K]``.
        patches: the patches of the T tokens.

    Raises:
        ValueError: the shapes do not match.
    """
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
    """Inner products of table rows and each token's vector: ``table[row[t,h,k]] . x[t]``.

    This is the gradient of ``gather_rows`` in its weights, and the first half of PEER.

    Args:
        table: as for ``gather_rows``.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R).
        x_TV: one vector per token, floating, ``[T, V]``.

    Returns:
        ``dots_THK``, ``[T, H, K]``, accumulated and returned in fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: the shapes do not match.
        IndexError: a row id lies outside the table.
    """
    check_vectors(table, rows_THK, x_TV)
    values_TCV = _values(table, rows_THK.flatten(1))
    return (values_TCV @ x_TV.unsqueeze(2).to(values_TCV.dtype)).view(rows_THK.shape)


def expert_lookup(
    down: Table, up: Table, rows_THK: Tensor, weights_THK: Tensor, x_TD: Tensor
) -> Tensor:
    """PEER's single-neuron experts: ``sum_hk w * gelu(down[row] . x) * up[row]``.

    "Mixture of a Million Experts" (arXiv 2407.04153), with the exact gelu of its code.

    Args:
        down: u, the experts' input rows, ``[R, D]``, a table as for ``gather_rows``.
        up: v, the experts' output rows, ``[R, V]``, a table as for ``gather_rows``.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R).
        weights_THK: one weight per expert, floating, ``[T, H, K]``.
        x_TD: one vector per token, floating, ``[T, D]``.

    Returns:
        ``out_TV``, ``[T, V]`` in fp32 (fp64 for fp64 tables).

    Raises:
        ValueError: the shapes do not match.
        IndexError: a row id lies outside a table.
    """
    inputs_THK = row_dots(down, rows_THK, x_TD)
    activations_THK = inputs_THK * (inputs_THK / 2**0.5).erf().add(1) / 2
    return gather_rows(up, rows_THK, weights_THK * activations_THK)


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``gather_rows`` in its table: of the rows that were read.

        grad_row[r] = sum of weights[t,h,k] * grad[t] over all (t, h, k) that read r

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, floating, ``[T, H, K]``.
        grad_TV: the gradient of the gathered sums, floating, ``[T, V]``.

    Returns:
        The U distinct rows read, int64 ``[U]`` in ascending order, and their gradients, ``[U, V]``
        in fp32 (fp64 for an fp64 gradient).

    Raises:
        ValueError: the shapes do not match.
        IndexError: a row id is negative.
    """
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
    """Sort reads by row; the reads of one row keep their order.

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, floating, ``[T, H, K]``.

    Raises:
        ValueError: rows and weights differ in shape.
        IndexError: a row id is negative.
    """
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
    """The squared norm of a table's gradient: its part of the norm that clipping uses.

    Args:
        groups: the reads; see ``group_rows``.
        grad_TV: the gradient of the gathered sums, floating, ``[T, V]``.

    Raises:
        ValueError: a token of the groups has no gradient.
    """
    check_groups(groups, grad_TV)
    return float(_group_sums(groups, grad_TV).detach().double().square().sum())


def sparse_adam(
    table_RV: Tensor, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor, step: AdamStep
) -> None:
    """Update the rows that were read, and their moments, by one step of Adam, in place.

        g = scale * sum of weight * grad[token] over a row's reads
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g
        row -= step_size * m / (sqrt(v) + eps)

    The row-wise variant has one moment per row:

        v = beta2 v + (1 - beta2) mean(g g);  row -= step_size * g / (sqrt(v) + eps)

    Rows that were not read do not change, nor do their moments, as in torch.optim.SparseAdam.
    Moments in bf16 are rounded to nearest when they are stored; a row's update uses them before
    that.

    Args:
        table_RV: the rows, fp32 or fp64, contiguous.
        moments: Adam's moments, contiguous, in the table's dtype, or in bf16: two moments per value
            of an fp32 table.
        groups: the reads; see ``group_rows``.
        grad_TV: the gradient of the gathered sums, floating, ``[T, V]``.
        step: the hyperparameters.

    Raises:
        ValueError: shapes or dtypes do not match.
        IndexError: a row id lies outside the table.
    """
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
