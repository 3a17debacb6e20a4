"""Operators that torch.compile runs and does not trace, because their gradients are sparse.

Imported while a graph is traced, and not before: it loads torch's compiler.
"""

import torch

from memory_ops import operations

_REASON = "memory_ops: the gradient of the table is sparse"
gather_rows = torch.compiler.disable(operations._gather_rows, reason=_REASON)  # type: ignore[no-untyped-call]
row_dots = torch.compiler.disable(operations._row_dots, reason=_REASON)  # type: ignore[no-untyped-call]
