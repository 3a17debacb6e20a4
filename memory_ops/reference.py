"""The memory layer's operations in plain torch: readable, at any precision, on any device.

Shape suffixes: T tokens, H memory heads, N subkeys per half, K rows read per head, R = N * N rows,
V value width. The formulas are those of "Memory Layers at Scale" (arXiv 2412.09764) and "Large
Memory Layers with Product Keys" (arXiv 1907.05242).
"""

import torch
from torch import Tensor

from memory_ops.checks import (
    Table,
    accumulation_dtype,
    check_gradients,
    check_rows,
    check_scores,
    check_vectors,
)
from memory_ops.row_formats import RowRecords, dequantize_rows


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
    # a stable sort, since torch.topk leaves the order of equal scores open
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
        weights_THK: one weight a row, floating, ``[T, H, K]``.

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


def row_dots(table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
    """Inner products of table rows and each token's vector: ``table[row[t,h,k]] . x[t]``.

    The gradient of ``gather_rows`` by its weights, and the first half of PEER.

    Args:
        table: as for ``gather_rows``.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R).
        x_TV: a vector a token, floating, ``[T, V]``.

    Returns:
        ``dots_THK``, ``[T, H, K]``, accumulated and returned in fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: the shapes do not fit together.
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
        up: v, their output rows, ``[R, V]``, likewise.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R).
        weights_THK: one weight an expert, floating, ``[T, H, K]``.
        x_TD: a vector a token, floating, ``[T, D]``.

    Returns:
        ``out_TV``, ``[T, V]`` in fp32 (fp64 for fp64 tables).

    Raises:
        ValueError: the shapes do not fit together.
        IndexError: a row id lies outside a table.
    """
    inputs_THK = row_dots(down, rows_THK, x_TD)
    activations_THK = inputs_THK * (inputs_THK / 2**0.5).erf().add(1) / 2
    return gather_rows(up, rows_THK, weights_THK * activations_THK)


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``gather_rows`` by its table, where it is not zero.

        grad_row[r] = sum of weights[t,h,k] * grad[t] over all (t, h, k) that read r

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight a row, floating, ``[T, H, K]``.
        grad_TV: the gradient by the gathered sums, floating, ``[T, V]``.

    Returns:
        The U distinct rows read, int64 ``[U]`` in ascending order, and their gradients, ``[U, V]``
        in fp32 (fp64 for an fp64 gradient).

    Raises:
        ValueError: the shapes do not fit together.
        IndexError: a row id is negative.
    """
    check_gradients(rows_THK, weights_THK, grad_TV)
    dtype = accumulation_dtype(grad_TV.dtype)
    if rows_THK.numel() and int(rows_THK.min()) < 0:
        raise IndexError(f"rows: {int(rows_THK.min())} is no row of any table")
    rows_U, place_L = torch.unique(rows_THK.flatten(), return_inverse=True)
    per_token = rows_THK.shape[1] * rows_THK.shape[2]
    grad_LV = grad_TV.to(dtype).repeat_interleave(per_token, dim=0)
    grad_LV = grad_LV * weights_THK.reshape(-1, 1).to(dtype)
    sums_UV = grad_TV.new_zeros((len(rows_U), grad_TV.shape[1]), dtype=dtype)
    return rows_U, sums_UV.index_add_(0, place_L, grad_LV)


def _values(table: Table, rows_TC: Tensor) -> Tensor:
    """The rows' values, ``[T, C, V]``, in the dtype that sums are taken in."""
    if isinstance(table, RowRecords):
        values_LV = dequantize_rows(table, rows_TC.flatten())
        return values_LV.view(*rows_TC.shape, table.value_dim)
    values_TCV = torch.nn.functional.embedding(rows_TC, table)
    return values_TCV.to(accumulation_dtype(table.dtype))


def _stable_topk(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :top_k], indices[..., :top_k]
