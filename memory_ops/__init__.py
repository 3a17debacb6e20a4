"""The memory layer's operations, one signature each, with the backend chosen here by device.

``product_topk`` and ``gather_rows`` are functions of tensors: no model, no files, no state. They
run on the plain-torch reference, which is differentiable and right on every device.
"""

from memory_ops.reference import gather_rows, product_topk

__all__ = ["gather_rows", "product_topk"]
