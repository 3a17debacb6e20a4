"""A tensor of a checkpoint of which a process holds all, or a range of rows or columns."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from memory_ops.tables.exchange import Exchange
from memory_ops.tables.table_shard import TableShard
from weights.checkpoints.table_files import float_rows
from weights.checkpoints.tensor_files import (
    STORED_DTYPES,
    StoredTensor,
    read_into,
    read_mapped,
    read_parts,
    tensor_bytes,
)

_WRITTEN_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorPart:
    """A tensor in memory, and what it is a part of.

    Attributes:
        tensor: contiguous; the whole tensor, or this process's part.
        shard: the part; None if it is the whole tensor. A tensor with one number per row is
            divided only if rows are.
    """

    tensor: Tensor
    shard: TableShard | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = tuple(self.tensor.shape)
        return shape if self.shard is None else self.shard.shape[: len(shape)]


def part_of_table(tensor: Tensor, shard: TableShard | None) -> TensorPart:
    """The part of a tensor of a table, its moments, or numbers per row."""
    is_whole = shard is None or (shard.axis == 1 and tensor.dim() == 1)
    return TensorPart(tensor, None if is_whole else shard)


def read_part(stored: StoredTensor, part: TensorPart) -> None:
    """Fill a part from a file that has the whole tensor, without a copy of the whole.

    Rows of other dtypes are converted, and records are dequantised.

    Raises:
        CheckpointError: the file cannot be read, or ends too early.
    """
    target, shard = part.tensor, part.shard
    by_rows = shard is not None and shard.axis == 0
    if shard is not None and by_rows:
        stored = stored.row_range(range(shard.first, shard.first + shard.size))
    is_same = STORED_DTYPES[stored.dtype] is target.dtype and stored.shape == tuple(target.shape)
    if is_same and target.is_cpu:
        read_into(stored, target)
        return
    if is_same:
        target.copy_(read_mapped(stored))
        return
    first = 0
    for rows in read_parts(stored):
        values = float_rows(stored, rows)
        if shard is not None and not by_rows:
            values = shard.part_of(values)
        target[first : first + len(rows)].copy_(values)
        first += len(rows)


def write_part(file: Path, offset: int, part: TensorPart, exchange: Exchange) -> None:
    """Write this process's share of a tensor that all processes of a group hold parts of.

    All processes must call this. Each writes whole rows, and fsyncs the file. Columns are
    exchanged for rows, some rows at a time.

    Args:
        file: an existing file that all processes can write, with its whole size.
        offset: offset of the tensor in bytes.
        part: this process's part.
        exchange: the processes.

    Raises:
        OSError: the rows cannot be written; all exchanges have been made.
    """
    assert part.shard is not None
    row_bytes = part.tensor.element_size()
    if part.tensor.dim() == 2:
        row_bytes *= part.shard.shape[1]
    rows = _by_columns if part.shard.axis == 1 else _by_rows
    failure: OSError | None = None
    descriptor = -1
    for first, values in rows(part.tensor, part.shard, exchange, row_bytes):
        if failure is not None:
            continue  # the other processes still exchange their columns
        try:
            if descriptor < 0:
                descriptor = os.open(file, os.O_WRONLY)
            _write_at(descriptor, tensor_bytes(values.contiguous()), offset + first * row_bytes)
        except OSError as error:
            failure = error
    if descriptor >= 0:
        try:
            os.fsync(descriptor)
        except OSError as error:
            failure = error
        os.close(descriptor)
    if failure is not None:
        raise failure


def _by_rows(
    tensor: Tensor, shard: TableShard, exchange: Exchange, row_bytes: int
) -> Iterator[tuple[int, Tensor]]:
    """Rows to write, on the CPU, with the index of the first one."""
    step = max(1, _WRITTEN_BYTES // row_bytes)
    for first in range(0, len(tensor), step):
        yield shard.first + first, tensor[first : first + step].cpu()


def _by_columns(
    tensor: Tensor, shard: TableShard, exchange: Exchange, row_bytes: int
) -> Iterator[tuple[int, Tensor]]:
    """As ``_by_rows``; of each group of rows, every process gets some with all columns."""
    step = max(1, _WRITTEN_BYTES // row_bytes) * exchange.count
    for first in range(0, len(tensor), step):
        rows = tensor[first : first + step]
        bounds = [len(rows) * one // exchange.count for one in range(exchange.count + 1)]
        begin, end = bounds[exchange.rank], bounds[exchange.rank + 1]
        shapes = [(end - begin, size) for size in shard.sizes]
        parts = [rows[a:b] for a, b in pairwise(bounds)]
        yield first + begin, torch.cat(exchange.swap(parts, shapes), dim=1).cpu()


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while len(content):
        done = os.pwrite(descriptor, content, offset)
        content, offset = content[done:], offset + done
