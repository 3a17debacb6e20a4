"""A stored tensor in shards of its first dimension, each of which is read when it is needed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.checkpoints.tensor_files import PART_BYTES


@dataclass(frozen=True)
class ShardedTensor:
    """Attributes: the whole tensor's shape and dtype, and loaders of its shards in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: tuple[Callable[[], Tensor], ...]

    def whole(self) -> Tensor:
        """The tensor; a single shard is not copied."""
        shards = [load() for load in self.shards]
        return shards[0] if len(shards) == 1 else torch.cat(shards)

    def parts(self) -> Iterator[Tensor]:
        """Parts of some rows, so that few of a mapped tensor's pages are in use."""
        for load in self.shards:
            shard = load()
            rows = max(1, PART_BYTES // max(1, shard[:1].nbytes)) if shard.ndim else 1
            for first in range(0, len(shard) if shard.ndim else 1, rows):
                yield shard[first : first + rows] if shard.ndim else shard

    def equals(self, other: "ShardedTensor") -> bool:
        """Whether both have the same shape, dtype and values; reads both in parts."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        if len(self.shards) != len(other.shards):
            return torch.equal(self.whole(), other.whole())
        return all(map(_equal, self.parts(), other.parts()))


def _equal(first: Tensor, second: Tensor) -> bool:
    # torch.save writes a shared tensor once
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)
