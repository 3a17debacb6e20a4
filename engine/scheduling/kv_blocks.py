"""Allocates KV blocks and caches those of known prefixes, by keyed hashes; ids, no tensors."""

import hashlib
import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile


class PrefixHasher:
    """Prefix hashes of one engine, chained from block to block; a random key prevents forgery.

    Callers with different salts share no prefixes, so response times reveal nothing between them.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._secret = secrets.token_bytes(32)

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], salt: str) -> None:
        """Append to ``hashes`` the missing hashes of the full blocks of ``token_ids``."""
        size = self._block_size
        previous = hashes[-1] if hashes else self._digest(salt.encode())
        for start in range(len(hashes) * size, len(token_ids) - size + 1, size):
            block = array("q", token_ids[start : start + size])
            previous = self._digest(previous + block.tobytes())
            hashes.append(previous)

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._secret, digest_size=16).digest()


class BlockPool:
    """Block ids 0 .. num_blocks - 1, each in one of three states.

    *Held*: used by one or more sequences that begin with the same tokens. *Cached*: full, unused,
    and found by its hash until it is evicted. *Free*: without useful contents.

    New blocks are taken in this order:

    1. free blocks that were used before, the last freed first: their memory is in use already;
    2. blocks that were never used, in the order of their ids: each makes the pool's memory grow;
    3. cached blocks, the least recently used first: each is evicted.

    A hash identifies a block's tokens and all that precede them (``PrefixHasher``).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: list[int] = []  # used before
        self._num_used = 0  # blocks from this id on were never used
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Number of blocks that nobody holds, cached ones included."""
        return self.num_blocks - self._num_used + len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks for ``num_tokens`` of one sequence, rounded up."""
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest published prefix of ``hashes``; it does not hold them."""
        known = takewhile(lambda prefix_hash: prefix_hash in self._published, hashes)
        return [self._published[prefix_hash] for prefix_hash in known]

    def take(self, shared: Sequence[int], count: int) -> list[int] | None:
        """Hold the ``shared`` blocks (from ``find``) and ``count`` new ones.

        Returns the new ones; or holds nothing and returns None if the pool has too few.
        """
        if count > self.num_available - sum(block in self._cached for block in shared):
            return None
        for block in shared:
            self._cached.pop(block, None)
            self._holders[block] += 1
        return [self._take_one() for _ in range(count)]

    def publish(self, block: int, prefix_hash: bytes) -> None:
        """Let others find a full block by its hash, unless one of equal contents is published."""
        if prefix_hash not in self._published and self._hashes[block] is None:
            self._published[prefix_hash] = block
            self._hashes[block] = prefix_hash

    def release(self, block_ids: Sequence[int]) -> None:
        """Release a sequence's blocks, given in order; published ones become cached."""
        # evict a prefix's end before its beginning, without which the end cannot be found
        for block in reversed(block_ids):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError if the pool disagrees with ``held``, the blocks of all sequences."""
        holders = Counter(held)
        assert all(self._holders[b] == holders[b] for b in range(self.num_blocks)), "wrong holders"
        unused = range(self._num_used, self.num_blocks)
        everything = sorted([*self._free, *unused, *self._cached, *holders])
        assert everything == list(range(self.num_blocks)), "KV blocks were lost or doubled"
        published = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert published == self._published, "a hash leads to another block"
        assert all(self._hashes[b] is not None for b in self._cached), "cached without a hash"
        assert all(self._hashes[b] is None for b in [*self._free, *unused]), "free with a hash"

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self._num_used < self.num_blocks:
            block = self._num_used
            self._num_used += 1
        else:
            block, _ = self._cached.popitem(last=False)
            prefix_hash = self._hashes[block]
            assert prefix_hash is not None
            del self._published[prefix_hash]
            self._hashes[block] = None
        self._holders[block] = 1
        return block
