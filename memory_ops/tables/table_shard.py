"""The part of a value table that one of several processes holds: a range of rows or columns."""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class TableShard:
    """A contiguous range of rows or columns; the shards of all processes cover the table once.

    Attributes:
        shape: R and V of the whole table.
        axis: 0 if the processes divide the rows, 1 if they divide the columns.
        bounds: ascending; process p holds ``[bounds[p], bounds[p + 1])``.
        rank: index of this process.
    """

    shape: tuple[int, int]
    axis: int
    bounds: tuple[int, ...]
    rank: int

    @classmethod
    def even(cls, shape: tuple[int, int], axis: int, rank: int, count: int) -> "TableShard":
        """Shard ``rank`` of ``count`` shards whose sizes differ by at most one.

        Raises:
            ValueError: the table has fewer rows or columns than there are processes.
        """
        size = shape[axis]
        if size < count:
            raise ValueError(f"{size} {('rows', 'columns')[axis]} cannot be divided by {count}")
        return cls(shape, axis, tuple(size * one // count for one in range(count + 1)), rank)

    @property
    def first(self) -> int:
        """The first row or column of this process."""
        return self.bounds[self.rank]

    @property
    def sizes(self) -> list[int]:
        """Rows or columns of each process."""
        return [end - begin for begin, end in pairwise(self.bounds)]

    @property
    def size(self) -> int:
        """Rows or columns of this process."""
        return self.sizes[self.rank]

    @property
    def local_shape(self) -> tuple[int, int]:
        """Rows and columns of this process's part."""
        num_rows, value_dim = self.shape
        return (self.size, value_dim) if self.axis == 0 else (num_rows, self.size)

    def part_of(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor of the whole size along ``axis``, without a copy."""
        return whole.narrow(self.axis, self.first, self.size)
