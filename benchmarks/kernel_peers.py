"""Memory operations of other libraries, for comparison: torch, and FBGEMM if installed."""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.drawn_tables import DRAWN_ROWS, repeated
from memory_ops.anonymous import anonymous_zeros
from memory_ops.checks import Table, table_shape
from memory_ops.row_formats import RowRecords, dequantize_rows

# rows and weights, [T, H, K] each
Gather = Callable[[Tensor, Tensor], object]


def product_topk(half_scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The naive algorithm in torch: topk of each half, all K * K sums, topk, softmax."""
    half_TH2K, subkeys_TH2K = half_scores_TH2N.topk(top_k, dim=-1)
    first, second = half_TH2K.unbind(2)
    scores, ranks = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2).topk(top_k, dim=-1)
    rows = subkeys_TH2K[:, :, 0].gather(-1, ranks // top_k) * half_scores_TH2N.shape[3]
    rows += subkeys_TH2K[:, :, 1].gather(-1, ranks % top_k)
    return rows, scores.softmax(-1)


def row_gradients(rows: Tensor, weights: Tensor, grad: Tensor, num_rows: int) -> Tensor:
    """The sparse gradient of ``F.embedding_bag(..., sparse=True)``, each row once."""
    per_token = rows[0].numel()
    values = grad.repeat_interleave(per_token, dim=0).mul_(weights.view(-1, 1))
    size = (num_rows, grad.shape[1])
    sparse = torch.sparse_coo_tensor(rows.view(1, -1), values, size, check_invariants=False)
    return sparse.coalesce()


def gathers(table: Table, dtype: str) -> dict[str, Gather]:
    """Gather functions of other libraries for this table's shape and dtype, by backend.

    They read int8 and int4 rows in their own formats. The values differ, the time does not.
    """
    found: dict[str, Gather] = {}
    if not isinstance(table, RowRecords):
        found["torch"] = functools.partial(_torch_bag, table)
    elif dtype != "fp8":
        found["torch"] = _torch_quantized_bag(table, dtype)
    # FBGEMM supports no bf16 and no e4m3 rows
    if dtype in ("fp32", "int8", "int4") and importlib.util.find_spec("fbgemm_gpu") is not None:
        found["fbgemm"] = _fbgemm_bag(*table_shape(table), dtype)
    return found


def _torch_bag(table_RV: Tensor, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
    weights_TC = weights_THK.flatten(1).to(table_RV.dtype)
    return functional.embedding_bag(
        rows_THK.flatten(1), table_RV, mode="sum", per_sample_weights=weights_TC
    )


def _torch_quantized_bag(table: RowRecords, dtype: str) -> Gather:
    bits = "byte" if dtype == "int8" else "4bit"
    pack = getattr(torch.ops.quantized, f"embedding_bag_{bits}_prepack")
    read = getattr(torch.ops.quantized, f"embedding_bag_{bits}_rowwise_offsets")
    num_rows = len(table.records_RB)
    values_PV = dequantize_rows(table, torch.arange(min(DRAWN_ROWS, num_rows)))
    rows_RB = repeated(pack(values_PV), num_rows)

    def bag(rows_THK: Tensor, weights_THK: Tensor) -> object:
        per_token = rows_THK[0].numel()
        starts = torch.arange(0, rows_THK.numel(), per_token)
        weights = weights_THK.flatten()
        return read(rows_RB, rows_THK.flatten(), starts, False, 0, False, weights, None, False)

    return bag


def _fbgemm_bag(num_rows: int, value_dim: int, dtype: str) -> Gather:
    package = "fbgemm_gpu.split_table_batched_embeddings_ops"
    kinds = importlib.import_module("fbgemm_gpu.split_embedding_configs").SparseType
    common = importlib.import_module(f"{package}_common")
    bags = importlib.import_module(f"{package}_inference").IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", num_rows, value_dim, kinds(dtype), common.EmbeddingLocation.HOST)],
        device="cpu",
        pooling_mode=common.PoolingMode.SUM,
        output_dtype=kinds.FP32,
    )
    bags.initialize_weights()
    # on huge pages like the other tables, and without NaN scales
    bags.weights_host = anonymous_zeros(bags.weights_host.shape, torch.uint8).fill_(1)

    def bag(rows_THK: Tensor, weights_THK: Tensor) -> object:
        per_token = rows_THK[0].numel()
        starts = torch.arange(0, rows_THK.numel() + 1, per_token, dtype=torch.int32)
        return bags(rows_THK.flatten().int(), starts, weights_THK.flatten())

    return bag
