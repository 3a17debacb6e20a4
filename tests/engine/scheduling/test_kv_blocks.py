"""The block pool: used, cached and free blocks, lookup by hash, and integrity."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduling.kv_blocks import BlockPool, PrefixHasher

NUM_BLOCKS = 8


class PoolMachine(RuleBasedStateMachine):
    """Sequences take, publish and release blocks; strings of letters model their contents."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, block_size=4)
        self.sequences = []  # [blocks, letters]
        self.contents = {}

    @rule(chain=st.text("ab", min_size=1, max_size=5))
    def begin(self, chain):
        hashes = [chain[: i + 1].encode() for i in range(len(chain))]
        shared = self.pool.find(hashes)
        for block, prefix in zip(shared, hashes, strict=False):
            assert self.contents[block] == prefix, "a hash led to a block of other contents"
        before = self.pool.num_available
        taken = self.pool.take(shared, len(chain) - len(shared))
        if taken is None:
            assert self.pool.num_available == before
            return
        held = {block for blocks, _ in self.sequences for block in blocks}
        assert not held & set(taken) and not set(shared) & set(taken)
        blocks = shared + taken
        for block, prefix in zip(taken, hashes[len(shared) :], strict=True):
            self.contents[block] = prefix
        self.sequences.append((blocks, hashes))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data):
        blocks, hashes = data.draw(st.sampled_from(self.sequences))
        for block, prefix in zip(blocks, hashes, strict=True):
            self.pool.publish(block, prefix)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data):
        at = data.draw(st.integers(0, len(self.sequences) - 1))
        blocks, _ = self.sequences.pop(at)
        self.pool.release(blocks)

    @invariant()
    def books_are_right(self):
        held = [block for blocks, _ in self.sequences for block in blocks]
        self.pool.check_integrity(held)
        assert self.pool.num_available == NUM_BLOCKS - len(set(held))


TestPool = PoolMachine.TestCase


def test_the_least_recently_used_prefix_is_evicted_first_from_its_end():
    pool = BlockPool(4, block_size=4)
    old, new = pool.take((), 2), pool.take((), 2)
    for name, blocks in (("old", old), ("new", new)):
        pool.publish(blocks[0], f"{name} 0".encode())
        pool.publish(blocks[1], f"{name} 1".encode())
    pool.release(old)
    pool.release(new)
    assert pool.take((), 1) == [old[1]]
    assert pool.find([b"old 0", b"old 1"]) == [old[0]]
    assert pool.take((), 1) == [old[0]] and pool.find([b"old 0"]) == []
    assert pool.find([b"new 0", b"new 1"]) == new


def test_the_integrity_check_finds_lost_and_duplicate_blocks():
    pool = BlockPool(3, block_size=4)
    (block,) = pool.take((), 1)
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    with pytest.raises(AssertionError):
        pool.check_integrity([block, block])
    pool.check_integrity([block])


def test_blocks_for_rounds_up():
    pool = BlockPool(3, block_size=4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def hashes(hasher: PrefixHasher, ids, salt: str = "") -> list[bytes]:
    found: list[bytes] = []
    hasher.extend(found, ids, salt)
    return found


def test_a_hash_covers_all_earlier_tokens_and_the_salt():
    hasher = PrefixHasher(block_size=4)
    base = hashes(hasher, range(12))
    assert len(base) == 3 and hashes(hasher, range(15)) == base
    assert hashes(hasher, [9, *range(1, 12)])[1:] != base[1:]
    assert not set(hashes(hasher, range(12), "mine")) & set(base)


def test_hashes_are_extended_as_the_sequence_grows():
    hasher = PrefixHasher(block_size=4)
    grown = hashes(hasher, range(5))
    hasher.extend(grown, range(13), "")
    assert grown == hashes(hasher, range(13))


def test_hashes_of_another_engine_differ():
    assert hashes(PrefixHasher(4), range(4)) != hashes(PrefixHasher(4), range(4))


def test_freed_blocks_are_reused_before_unused_ones_and_cached_ones_last():
    pool = BlockPool(6, block_size=4)
    first = pool.take((), 3)
    assert first == [0, 1, 2]
    pool.publish(first[0], b"cached")
    pool.release(first)
    # freed blocks without contents are reused, any number of times
    for _ in range(3):
        again = pool.take((), 2)
        assert sorted(again) == [1, 2]
        pool.release(again)
    assert pool.take((), 4) == [1, 2, 3, 4]
    assert pool.take((), 1) == [5] and pool.find([b"cached"]) == [0]
    # cached contents are evicted only when no other block is free
    assert pool.take((), 1) == [0] and pool.find([b"cached"]) == []
