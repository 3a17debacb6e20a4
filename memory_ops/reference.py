"""Readable product-key top-K and weighted row gather in plain torch, at any precision.

Shape suffixes: T tokens, H memory heads, N subkeys per half, K rows read per head, R = N * N rows,
V value width. The formulas are those of "Memory Layers at Scale" (arXiv 2412.09764) and "Large
Memory Layers with Product Keys" (arXiv 1907.05242).
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


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
    if half_scores_TH2N.dim() != 4 or half_scores_TH2N.shape[2] != 2:
        shape = tuple(half_scores_TH2N.shape)
        raise ValueError(f"half_scores: expected [T, H, 2, N], got {shape}")
    num_subkeys = half_scores_TH2N.shape[3]
    if not 1 <= top_k <= num_subkeys:
        raise ValueError(f"top_k: {top_k} is outside [1, {num_subkeys}], the subkeys of one half")
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


def gather_rows(table_RV: Tensor, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
    """Sum weighted table rows over heads and choices: ``out[t] = sum_hk w[t,h,k] * table[row]``.

    Args:
        table_RV: the value table, ``[R, V]``, any floating dtype.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R).
        weights_THK: one weight a row, floating, ``[T, H, K]``.

    Returns:
        ``out_TV``, ``[T, V]``, accumulated and returned in fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: rows and weights differ in shape, or the table is not a matrix.
        IndexError: a row id lies outside the table.
    """
    if table_RV.dim() != 2:
        raise ValueError(f"table: expected [R, V], got {tuple(table_RV.shape)}")
    if rows_THK.dim() != 3 or rows_THK.shape != weights_THK.shape:
        shapes = f"{tuple(rows_THK.shape)} and {tuple(weights_THK.shape)}"
        raise ValueError(f"rows and weights: expected the same shape [T, H, K], got {shapes}")
    dtype = accumulation_dtype(table_RV.dtype)
    values_TCV = torch.nn.functional.embedding(rows_THK.flatten(1), table_RV).to(dtype)
    weights_T1C = weights_THK.flatten(1).unsqueeze(1).to(dtype)
    return torch.bmm(weights_T1C, values_TCV).squeeze(1)


def _stable_topk(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :top_k], indices[..., :top_k]
