"""Tests of the index of prompt prefixes."""

from server.replicas.prefix_index import PrefixIndex

LONG = "".join(f"word {number} " for number in range(100))


def test_a_replica_has_the_part_of_a_prompt_that_it_saw():
    index = PrefixIndex()
    index.record("", LONG[:256], "a")
    assert index.shares("", LONG[:256]) == {"a": 1.0}
    assert index.shares("", LONG[:512]) == {"a": 0.5}
    assert index.shares("", "x" + LONG[:512]) == {}
    assert index.shares("", "") == {}


def test_a_gap_ends_the_prefix():
    index = PrefixIndex()
    index.record("", LONG[:128], "a")
    index.record("", LONG[:64] + "y" * 64 + LONG[128:256], "b")
    assert index.shares("", LONG[:256]) == {"a": 0.5, "b": 0.25}


def test_scopes_share_nothing():
    index = PrefixIndex()
    index.record("law", LONG, "a")
    assert index.shares("med", LONG) == {}


def test_the_oldest_blocks_and_dead_replicas_are_forgotten():
    index = PrefixIndex(max_blocks=4)
    index.record("", LONG[:256], "a")
    index.record("", "z" * 128, "b")
    assert len(index) == 4
    assert index.shares("", LONG[:256]) == {}  # its first blocks are gone
    index.forget("b")
    assert index.shares("", "z" * 128) == {} and len(index) == 2


def test_a_prompt_of_any_length_takes_bounded_memory():
    index = PrefixIndex()
    index.record("", "".join(map(str, range(10**5))), "a")
    assert len(index) == 1024
