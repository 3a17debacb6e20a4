"""A tensor in shards of its first dimension, which lie in files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from weights.checkpoints.tensor_files import (
    DTYPES,
    PART_BYTES,
    StoredTensor,
    read_mapped,
    read_parts,
)


@dataclass(frozen=True)
class ShardedTensor:
    """Attributes: the whole tensor's shape, and its shards in order, all of one dtype."""

    shape: tuple[int, ...]
    shards: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the shards."""
        return DTYPES[self.shards[0].dtype]

    def whole(self) -> Tensor:
        """The tensor; a single shard is mapped, not copied."""
        shards = [read_mapped(shard) for shard in self.shards]
        return shards[0] if len(shards) == 1 else torch.cat(shards)

    def parts(self) -> Iterator[Tensor]:
        """The rows in order, in parts of at most 4 MiB or one row; see ``read_parts``."""
        return chain.from_iterable(map(read_parts, self.shards))

    def equals(self, other: "ShardedTensor") -> bool:
        """Whether both have the same shape, dtype and bytes; reads both in parts."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        if [(s.file, s.offset) for s in self.shards] == [(s.file, s.offset) for s in other.shards]:
            return True  # torch.save writes a shared tensor once
        edges = sorted({*self._edges(), *other._edges()})
        return all(map(_same_bytes, self._parts(edges), other._parts(edges)))

    def _edges(self) -> list[int]:
        """Rows at which parts begin, and the number of rows."""
        edges: list[int] = []
        first = 0
        for shard in self.shards:
            rows = shard.shape[0] if shard.shape else 1
            step = max(1, PART_BYTES * rows // max(1, shard.num_bytes))
            edges += range(first, first + rows, step)
            first += rows
        return [*edges, first]

    def _parts(self, edges: Sequence[int]) -> Iterator[Tensor]:
        """The rows between these, mapped; a scalar is one row."""
        first, place = 0, 0
        for shard in self.shards:
            rows = torch.atleast_1d(read_mapped(shard))  # type: ignore[no-untyped-call]
            last = first + len(rows)
            while place + 1 < len(edges) and edges[place + 1] <= last:
                yield rows[edges[place] - first : edges[place + 1] - first]
                place += 1
            first = last


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    # NaN is not equal to itself
    return torch.equal(first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8))
