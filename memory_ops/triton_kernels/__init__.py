"""GPU backend: the operations as Triton kernels, with the reference's signatures.

Tested in Triton's interpreter and by compiling to machine code; those of serving also on an H100,
those of training not yet. Importing this package imports triton, an optional dependency; importing
memory_ops does not.
"""

from memory_ops.triton_kernels.add_patched_rows import add_patched_rows
from memory_ops.triton_kernels.gather_rows import gather_rows
from memory_ops.triton_kernels.group_rows import group_rows
from memory_ops.triton_kernels.product_topk import product_topk
from memory_ops.triton_kernels.row_dots import row_dots
from memory_ops.triton_kernels.row_gradients import row_gradients
from memory_ops.triton_kernels.sparse_adam import sparse_adam
from memory_ops.triton_kernels.squared_norm import squared_norm

__all__ = [
    "add_patched_rows",
    "gather_rows",
    "group_rows",
    "product_topk",
    "row_dots",
    "row_gradients",
    "sparse_adam",
    "squared_norm",
]
