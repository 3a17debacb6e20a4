"""Which KV blocks are free: pure accounting of ids, no tensors."""

from collections.abc import Iterable


class BlockPool:
    """Block ids 0 .. num_blocks - 1, each free or held by exactly one sequence."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens of one sequence fill, the last perhaps in part."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` free blocks, or none at all and return ``None``: the pool is full."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def release(self, block_ids: Iterable[int]) -> None:
        """Return blocks that were allocated; they hold nothing of value afterwards."""
        self._free.extend(block_ids)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Check that free and ``held`` blocks together are all blocks, each once.

        Raises:
            AssertionError: a block is lost, held twice, or free while held.
        """
        everything = sorted([*self._free, *held])
        assert everything == list(range(self.num_blocks)), "KV blocks were lost or doubled"
