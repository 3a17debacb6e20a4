"""``memplus bench eviction``: policies and bounds on traces with known results."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory.eviction import (
    BOUNDS,
    Reads,
    compare,
    interleaved,
    policy_hits,
)
from benchmarks.memory.eviction_policies import POLICIES
from benchmarks.row_trace import AccessTrace
from engine.errors import ConfigError
from memory_ops.native import disk_rows
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from server.cli.main import main

A, B, C, D, E = range(5)
READS = st.lists(st.integers(0, 4), min_size=2, max_size=9)


def trace_of(rows_TMHK, num_rows=5):
    rows = np.array(rows_TMHK)
    counts = np.stack([np.bincount(own.reshape(-1), minlength=num_rows) for own in rows[:, :, 0].T])
    return AccessTrace(rows, counts, len(rows))


def reads_of(rows, first):
    return Reads(np.array(rows), first, len(rows) - first, 5)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        # rows in a 3-slot cache after the reads A, B, C, A, A, B, D
        ("fifo", {B, C, D}),
        ("lru", {A, B, D}),
        ("clock", {A, B, D}),
        ("clock-3", {A, B, D}),
        ("lfu", {A, B, D}),
        ("least of 16", {A, B, D}),
    ],
)
def test_a_policy_evicts_the_expected_row(policy, kept):
    def is_kept(row):
        cache = POLICIES[policy](3, 5)
        for one in (A, B, C, A, A, B, D):
            cache.use(one)
        return cache.use(row)

    assert {row for row in range(5) if is_kept(row)} == kept


@pytest.mark.parametrize(
    ("policy", "hits"),
    [("fifo", 0), ("lru", 0), ("clock", 1), ("clock-2", 2), ("clock-3", 3), ("clock-7", 3)],
)
def test_a_higher_count_limit_keeps_a_row_longer(policy, hits):
    # A has 3 more uses; then other rows pass through the second slot, with reads of A between
    rows, asked = [A, A, A, A, B, C, A, D, E, A, B, C, A], (6, 9, 12)
    cache = POLICIES[policy](2, 5)
    found = [cache.use(row) for row in rows]
    assert sum(found[i] for i in asked) == hits


@pytest.mark.parametrize("policy", ["lfu", "least of 16"])
def test_evicted_rows_keep_their_use_counts(policy):
    cache = POLICIES[policy](2, 5)
    for row in (A, A, B, B, C, C, C):
        cache.use(row)  # C evicts A, the least recently used
    cache.use(A)  # evicts B, which has two uses
    assert cache.use(A) and cache.use(C) and not cache.use(B)


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
@pytest.mark.parametrize("num_slots", [5, 16, 40])
def test_the_simulation_matches_the_disk_tier(tmp_path, num_slots):
    (tmp_path / "table").write_bytes(torch.randn(100, 4).numpy().tobytes())
    cache_bytes, shape = row_cache_bytes(num_slots, 16, 100), (100, 4)
    table = DiskTable(tmp_path / "table", 0, shape, torch.float32, cache_bytes, threads=1)
    cache, misses = POLICIES["least of 16"](num_slots, 100), 0
    for row in np.random.default_rng(0).geometric(0.03, 3000) % 100:
        table.start(torch.tensor([[[int(row)]]]), torch.ones(1, 1, 1)).finish()
        misses += not cache.use(int(row))
        assert table.statistics()[0].misses == misses
    assert misses > 200


def best_hits(rows, cache, num_slots):
    """The maximum of hits from a cache of these rows, by exhaustive search."""
    if not rows:
        return 0
    row, later = rows[0], rows[1:]
    if row in cache:
        return 1 + best_hits(later, cache, num_slots)
    if len(cache) < num_slots:
        return best_hits(later, cache | {row}, num_slots)
    return max(best_hits(later, cache - {other} | {row}, num_slots) for other in cache)


def subsets(rows, num_slots):
    seen = set(rows)
    return [set(some) for some in itertools.combinations(seen, min(num_slots, len(seen)))]


@given(rows=READS, num_slots=st.integers(1, 3), data=st.data())
def test_the_optimum_equals_exhaustive_search(rows, num_slots, data):
    first = data.draw(st.integers(0, len(rows) - 1))
    wanted = max(
        best_hits(rows[first:], cache, num_slots) for cache in subsets(rows[:first], num_slots)
    )
    assert BOUNDS["optimum (Belady)"](reads_of(rows, first), num_slots) == wanted


@given(rows=READS, num_slots=st.integers(1, 3), data=st.data())
def test_the_best_static_bound_equals_exhaustive_search(rows, num_slots, data):
    first = data.draw(st.integers(0, len(rows) - 1))
    choices = subsets(rows[:first], num_slots)
    wanted = max(sum(row in kept for row in rows[first:]) for kept in choices)
    assert BOUNDS["best static"](reads_of(rows, first), num_slots) == wanted


@given(rows=st.lists(st.integers(0, 30), min_size=40, max_size=200), num_slots=st.integers(1, 12))
def test_no_policy_beats_the_optimum(rows, num_slots):
    reads = Reads(np.array(rows), len(rows) // 2, len(rows) - len(rows) // 2, 31)
    most = BOUNDS["optimum (Belady)"](reads, num_slots)
    for make in POLICIES.values():
        assert policy_hits(reads, make(num_slots, 31)) <= most


def test_a_row_counts_once_per_lookup():
    # four tokens, two layers of one head: two rows each
    rows = [[[[A, A]], [[B, C]]], [[[A, C]], [[C, B]]], [[[D, B]], [[A, D]]], [[[B, D]], [[E, E]]]]
    alone = interleaved(trace_of(rows), 1)
    assert alone.rows.tolist() == [A, B, C, A, C, C, B, D, B, A, D, B, D, E]
    assert (alone.first, alone.tokens, alone.num_rows) == (7, 2, 5)
    together = interleaved(trace_of(rows), 2)
    # one lookup for the first and third token, one for the second and fourth
    assert together.rows.tolist() == [A, D, B, B, C, A, D, A, C, B, D, C, B, E]
    assert (together.first, together.tokens) == (7, 2)


def test_only_the_second_half_is_counted():
    # the first half, A, B, A, B, caches A and B, but not C and D
    trace = trace_of([[[[row]]] for row in (A, B, A, B, A, C, D, B)])
    found = {one.policy: one for one in compare(trace, [0.4], 1)}
    assert set(found) == {*POLICIES, *BOUNDS}
    best = found["optimum (Belady)"]
    assert (best.hit_rate, best.misses_per_token) == (0.5, 0.5)
    assert found["best static"].hit_rate == 0.5
    assert found["lru"].hit_rate == found["fifo"].hit_rate == 0.25


def test_the_verb_prints_and_writes_the_results(tmp_path, capsys):
    file, out = tmp_path / "trace.npz", tmp_path / "out.json"
    trace_of(np.random.default_rng(0).integers(0, 5, (8, 2, 1, 2))).save(file)
    arguments = ["bench", "eviction", "--trace", str(file)]
    shares = ["--cache-shares", "0.4", "1"]
    assert main([*arguments, *shares, "--sequences", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    written = json.loads(out.read_text())
    assert len(written) == len(printed) - 1 == 2 * len({*POLICIES, *BOUNDS})
    assert set(written[0]) == {
        *("policy", "cache_share", "sequences", "hit_rate", "misses_per_token")
    }
    assert {one["cache_share"] for one in written} == {0.4, 1}
    for wrong, message in [
        (["--cache-shares", "0.01"], "--cache-shares: 0.01 is 0 rows; must be 1 to 5"),
        (["--cache-shares", "1.5"], "--cache-shares: 1.5"),
        (["--sequences", "5"], "sequences: 5 have fewer than 2 tokens each, of 8"),
        (["--sequences", "0"], "sequences: 0"),
    ]:
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_too_many_sequences_are_rejected():
    with pytest.raises(ConfigError, match="sequences: 3 have fewer than 2"):
        interleaved(trace_of([[[[A]]]] * 5), 3)
