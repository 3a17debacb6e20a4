"""Parts of a stored value table as floating values, whatever the row format."""

from collections.abc import Iterator

import torch
from torch import Tensor

from memory_ops.row_formats import RowRecords, dequantize_rows
from weights.checkpoints.table_files import RowLayout, stored_layout
from weights.checkpoints.tensor_files import StoredTensor, read_mapped

_PART_VALUES = 2**20


def float_rows(rows: Tensor, layout: RowLayout) -> Tensor:
    """Stored rows as ``[P, V]`` in fp32, or in fp64 if they are stored so."""
    if layout.records is not None:
        return dequantize_rows(RowRecords(rows, *layout.records))
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def paired_rows(first: StoredTensor, second: StoredTensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Equal row ranges of two tables of the same R and V, in order, in parts of bounded size.

    Yields:
        The first row id of a part, and the values of both tables.

    Raises:
        CheckpointError: a file cannot be read, or does not describe its rows.
    """
    layouts = stored_layout(first), stored_layout(second)
    tables = read_mapped(first), read_mapped(second)
    values_per_row = layouts[0].records[1] if layouts[0].records else first.shape[1]
    step = max(1, _PART_VALUES // values_per_row)
    for start in range(0, first.shape[0], step):
        one, other = (
            float_rows(rows[start : start + step], layout)
            for rows, layout in zip(tables, layouts, strict=True)
        )
        yield start, one, other
