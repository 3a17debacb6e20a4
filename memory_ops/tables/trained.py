"""A value table for training: records reads for a sparse optimiser instead of a dense gradient."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.anonymous import anonymous_zeros
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups
from memory_ops.tables.device import DeviceTable, ReadyLookup
from memory_ops.tables.table_shard import TableShard


class TableReads(NamedTuple):
    """Reads of T tokens (``rows_THK``, ``weights_THK``), and ``grad_TV`` of their weighted sums."""

    rows_THK: Tensor
    weights_THK: Tensor
    grad_TV: Tensor


class TrainedTable(DeviceTable):
    """A table whose lookups are differentiable; backward passes record the rows that were read.

    The table is not a parameter. Each backward pass appends to ``reads``, from which a sparse
    optimiser computes the gradients of the rows. Reads of several passes accumulate, like
    gradients. Other tiers override how rows are read and updated.

    Attributes:
        table_RV: the rows, fp32, contiguous; the optimiser updates them in place.
        reads: the reads since the last ``take_reads``, in the order of the backward passes.
        shard: the part of the table that this process holds; None if it holds all of it.
    """

    shard: TableShard | None = None

    def __init__(self, table_RV: Tensor) -> None:
        """Hold ``table_RV``, ``[R, V]``, without copying it.

        Raises:
            ValueError: the tensor is not a contiguous fp32 matrix.
        """
        super().__init__(table_RV)
        if table_RV.dtype is not torch.float32 or not table_RV.is_contiguous():
            raise ValueError(f"table: expected contiguous float32 rows, got {table_RV.dtype}")
        self.table_RV = table_RV
        self.reads: list[TableReads] = []
        # makes autograd run backward even if the weights need no gradient
        self._anchor = torch.zeros((), requires_grad=True)

    def row_source(self, layer: int) -> None:
        """None: native kernels record no reads for gradients."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> ReadyLookup:
        self.count(rows_THK.numel(), layer)
        return ReadyLookup(partial(self.read, rows_THK, weights_THK))

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> ReadyLookup:
        self.count(rows_THK.numel(), layer)
        return ReadyLookup(partial(self.dots, rows_THK, x_TV))

    def read(self, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
        """Weighted sums, differentiable; see ``ValueTable.start``."""
        out_TV: Tensor = _Read.apply(weights_THK, self._anchor, rows_THK, self)  # type: ignore[no-untyped-call]
        return out_TV

    def dots(self, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
        """Inner products with rows, differentiable; see ``ValueTable.start_dots``."""
        dots_THK: Tensor = _Dots.apply(x_TV, self._anchor, rows_THK, self)  # type: ignore[no-untyped-call]
        return dots_THK

    def gather(self, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
        """Weighted sums, not differentiable, of a lookup that has been started."""
        return operations.gather_rows(self.table_RV, rows_THK, weights_THK)

    def row_dots(self, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
        """Inner products, not differentiable, of a lookup that has been started."""
        return operations.row_dots(self.table_RV, rows_THK, x_TV)

    def record(self, reads: TableReads) -> None:
        """Add the reads of a lookup's backward pass."""
        self.reads.append(reads)

    def read_backward(self, reads: TableReads, *, needs_weights: bool) -> Tensor | None:
        """Record the reads of a ``read``; return the gradient of its weights if it is needed."""
        self.record(reads)
        return self.row_dots(reads.rows_THK, reads.grad_TV) if needs_weights else None

    def dots_backward(self, reads: TableReads, *, needs_vectors: bool) -> Tensor | None:
        """Record the reads of ``dots``; return the gradient of its vectors if it is needed."""
        self.record(reads)
        return self.gather(reads.rows_THK, reads.weights_THK) if needs_vectors else None

    def read_counts(self, groups: RowGroups) -> Tensor:
        """Reads of each row of ``groups``, int64 ``[U]``, which came from ``take_reads``."""
        return groups.starts_U1.diff()

    def new_moments(self, *, is_row_wise: bool, dtype: torch.dtype) -> AdamMoments:
        """Moments of 0, where this tier keeps them; ``dtype`` is for two moments per value.

        On the CPU, their pages take no memory before their first use.
        """
        shape = tuple(self.table_RV.shape)
        if is_row_wise:
            return AdamMoments(None, self._zeros(shape[:1], torch.float32))
        return AdamMoments(self._zeros(shape, dtype), self._zeros(shape, dtype))

    def update(
        self, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor, step: AdamStep
    ) -> None:
        """A step of Adam for the rows of ``groups``; ``moments`` are those of this table."""
        operations.sparse_adam(self.table_RV, moments, groups, grad_TV, step)

    def synchronize(self) -> None:
        """Wait until the host can read or write the rows and moments. Rows here always can."""

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.table_RV.is_cpu:
            return anonymous_zeros(shape, dtype)
        return self.table_RV.new_zeros(shape, dtype=dtype)

    def take_reads(self) -> TableReads | None:
        """Remove all recorded reads and return them concatenated; None if there are none."""
        reads, self.reads = self.reads, []
        if not reads:
            return None
        return TableReads(*(torch.cat(parts) for parts in zip(*reads, strict=True)))


class _Read(torch.autograd.Function):
    """``gather_rows`` whose backward records the read instead of a gradient of the table."""

    @staticmethod
    def forward(
        ctx: Any, weights_THK: Tensor, anchor: Tensor, rows_THK: Tensor, table: TrainedTable
    ) -> Tensor:
        ctx.save_for_backward(weights_THK, rows_THK)
        ctx.table = table
        return table.gather(rows_THK, weights_THK)

    @staticmethod
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, None, None, None]:
        weights_THK, rows_THK = ctx.saved_tensors
        table: TrainedTable = ctx.table
        reads = TableReads(rows_THK, weights_THK, grad_TV)
        grad_THK = table.read_backward(reads, needs_weights=ctx.needs_input_grad[0])
        grad_THK = None if grad_THK is None else grad_THK.to(weights_THK.dtype)
        return grad_THK, None, None, None


class _Dots(torch.autograd.Function):
    """``row_dots`` whose backward records a read: a row's gradient is the sum of its vectors,
    weighted by the gradients of their inner products."""

    @staticmethod
    def forward(
        ctx: Any, x_TV: Tensor, anchor: Tensor, rows_THK: Tensor, table: TrainedTable
    ) -> Tensor:
        ctx.save_for_backward(x_TV, rows_THK)
        ctx.table = table
        return table.row_dots(rows_THK, x_TV)

    @staticmethod
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, None, None, None]:
        x_TV, rows_THK = ctx.saved_tensors
        table: TrainedTable = ctx.table
        reads = TableReads(rows_THK, grad_THK, x_TV.float())
        grad_TV = table.dots_backward(reads, needs_vectors=ctx.needs_input_grad[0])
        grad_TV = None if grad_TV is None else grad_TV.to(x_TV.dtype)
        return grad_TV, None, None, None
