"""Which KV blocks are free, held or kept for their contents: accounting of ids, no tensors."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Block ids 0 .. num_blocks - 1, each in one of three states.

    *Held*: by one sequence, or by several that begin with the same tokens. *Kept*: held by nobody,
    full, and found again by its hash until it is the least recently used and its place is needed.
    *Free*: worth nothing.

    New blocks are taken in this order:

    1. freed blocks without cached contents, the last freed first: their memory is in use already;
    2. blocks that were never used, in the order of their ids: each makes the pool's memory grow;
    3. kept blocks, the least recently used first: each loses cached contents.

    So the memory in use is that of the blocks held at once plus the cached ones, and contents are
    evicted only when the whole pool is in use.

    A hash stands for a block's tokens and all that precede them (``scheduling.prefix_hash``).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: list[int] = []  # used before
        self._num_used = 0  # blocks from this id on were never used
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds, kept ones included."""
        return self.num_blocks - self._num_used + len(self._free) + len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens of one sequence fill, the last perhaps in part."""
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest beginning of ``hashes`` that is published; nothing is taken."""
        found = []
        for prefix_hash in hashes:
            block = self._published.get(prefix_hash)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, shared: Sequence[int], count: int) -> list[int] | None:
        """Hold the ``shared`` blocks (from ``find``) too, and ``count`` new ones.

        Returns the new ones; or ``None``, and nothing is held: the pool is full.
        """
        if count > self.num_available - sum(block in self._kept for block in shared):
            return None
        for block in shared:
            self._kept.pop(block, None)
            self._holders[block] += 1
        return [self._take_one() for _ in range(count)]

    def publish(self, block: int, prefix_hash: bytes) -> None:
        """Let a held block, now full and computed, be found by its hash.

        A second block of the same contents stays private.
        """
        if prefix_hash not in self._published and self._hashes[block] is None:
            self._published[prefix_hash] = block
            self._hashes[block] = prefix_hash

    def release(self, block_ids: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in order; published ones are kept a while."""
        # the end of a prefix is worth less than its beginning, without which it is not found
        for block in reversed(block_ids):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def check_integrity(self, held: Iterable[int]) -> None:
        """Check the books against ``held``: the blocks of all sequences, with repeats.

        Raises:
            AssertionError: a block is lost, counted wrongly, or found under a hash not its own.
        """
        holders = Counter(held)
        assert all(self._holders[b] == holders[b] for b in range(self.num_blocks)), "wrong holders"
        unused = range(self._num_used, self.num_blocks)
        everything = sorted([*self._free, *unused, *self._kept, *holders])
        assert everything == list(range(self.num_blocks)), "KV blocks were lost or doubled"
        published = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert published == self._published, "a hash leads to another block"
        assert all(self._hashes[b] is not None for b in self._kept), "kept without a hash"
        assert all(self._hashes[b] is None for b in [*self._free, *unused]), "free with a hash"

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self._num_used < self.num_blocks:
            block = self._num_used
            self._num_used += 1
        else:
            block, _ = self._kept.popitem(last=False)
            prefix_hash = self._hashes[block]
            assert prefix_hash is not None
            del self._published[prefix_hash]
            self._hashes[block] = None
        self._holders[block] = 1
        return block
