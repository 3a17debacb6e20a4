"""The block pool hands out each block once and says when it is full."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_blocks import BlockPool


@given(st.lists(st.integers(0, 5), max_size=40), st.randoms(use_true_random=False))
def test_blocks_are_held_once_or_free(counts, random):
    pool, held = BlockPool(12, block_size=4), []
    for count in counts:
        free = pool.num_free
        taken = pool.allocate(count)
        if taken is None:
            assert count > free == pool.num_free
            if held:
                pool.release(held.pop(random.randrange(len(held))))
        else:
            assert len(taken) == count and pool.num_free == free - count
            held.append(taken)
        pool.check_integrity([block for blocks in held for block in blocks])


def test_integrity_sees_lost_and_doubled_blocks():
    pool = BlockPool(3, block_size=4)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.check_integrity([block])


def test_blocks_for_rounds_up():
    pool = BlockPool(3, block_size=4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
