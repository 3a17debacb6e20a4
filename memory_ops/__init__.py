"""The memory layer's operations: functions of tensors, without model, files or state.

Each has one signature, a reference in plain torch and faster backends; ``backends`` chooses.
"""

from memory_ops.checks import Table
from memory_ops.operations import (
    expert_lookup,
    gather_rows,
    group_rows,
    product_topk,
    quantize_rows,
    row_dots,
    row_gradients,
    sparse_adam,
    squared_norm,
)
from memory_ops.row_formats import ROW_FORMATS, RowRecords, dequantize_rows
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups

__all__ = [
    "ROW_FORMATS",
    "AdamMoments",
    "AdamStep",
    "RowGroups",
    "RowRecords",
    "Table",
    "dequantize_rows",
    "expert_lookup",
    "gather_rows",
    "group_rows",
    "product_topk",
    "quantize_rows",
    "row_dots",
    "row_gradients",
    "sparse_adam",
    "squared_norm",
]
