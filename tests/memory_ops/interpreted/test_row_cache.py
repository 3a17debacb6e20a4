"""The row cache: its kernels against the plain Python model, and lookups through it."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memory_ops.row_formats import RowRecords
from memory_ops.tables.host_cache_size import host_cache_bytes
from memory_ops.tables.row_cache import RowCache, rows_memory
from memory_ops.triton_kernels import gather_rows, row_dots
from memory_ops.triton_kernels.place_rows import NUM_COUNTS, CacheSets, Placed, place_rows
from memory_ops.triton_kernels.sort_rows import KEY_FACTOR, sort_rows
from tests.memory_ops.row_cache_model import CacheModel
from tests.memory_ops.table_kinds import KINDS, num_rows, rows_of, table_of, vast_table

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# a few ids that repeat, and some of any size
row_ids = st.integers(0, 9) | st.integers(0, 2**62)
calls = st.tuples(st.booleans(), st.lists(row_ids, min_size=1, max_size=20))


def state_of(model: CacheModel) -> tuple[Tensor, Tensor]:
    """Tags and priorities as the kernels keep them."""
    tags = [[way.row for way in ways] for ways in model.ways]
    priorities = [
        [(way.uses << 48) + way.last * 2 + way.is_hinted for way in ways] for ways in model.ways
    ]
    return torch.tensor(tags), torch.tensor(priorities)


def unwritten_ids(like: Tensor) -> Tensor:
    return torch.full_like(like, -(2**60))


def check_places(model: CacheModel, rows: list[int], missing: dict[int, bool], placed: Placed):
    """Cached rows have their way's place, others a place past the sets; misses are fetched."""
    ways = sum(len(ways) for ways in model.ways)
    extra_places = {}
    for row, place in zip(rows, placed.places_L.tolist(), strict=True):
        if model.place(row) is None:
            assert ways <= place < ways + len(rows)
            assert extra_places.setdefault(row, place) == place
        else:
            assert place == model.place(row)
    assert len(set(extra_places.values())) == len(extra_places)
    places = dict(zip(rows, placed.places_L.tolist(), strict=True))
    fetched = [place for place in placed.fetch_L.tolist() if place != -1]
    assert sorted(fetched) == sorted(places[row] for row in missing if missing[row])


@example([7] * 600)
@given(st.lists(row_ids, min_size=1, max_size=600))
def test_references_are_sorted_stably_by_key(rows):
    keys = [row * KEY_FACTOR.value % 2**63 for row in rows]
    sorted_rows = sort_rows(torch.tensor(rows))
    order = sorted(range(len(rows)), key=lambda reference: (keys[reference], reference))
    assert sorted_rows.order_L.tolist() == order
    assert sorted_rows.keys_L.tolist() == sorted(keys)


# more uses than the counter holds; a hit after eight references to a row that needs a way;
# hints while all rows have uses, and after their use counts have decayed
@example(1, 2, [(False, [1, 2])] * 6)
@example(1, 4, [(False, [1, 2, 3, 4]), (False, [0] * 9 + [2])])
@example(1, 2, [(False, [1, 2])] * 2 + [(True, [3, 4])] * 2)
@given(st.integers(1, 5), st.sampled_from([1, 2, 4]), st.lists(calls, min_size=1, max_size=4))
def test_places_equal_those_of_the_plain_model(num_sets, num_ways, asked):
    model = CacheModel(num_sets, num_ways)
    tags = torch.full((num_sets, num_ways), -1)
    sets = CacheSets(tags, torch.zeros_like(tags))
    counts = torch.zeros(NUM_COUNTS, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        # a place that the kernel does not write stays visible
        patch.setattr(torch, "empty_like", unwritten_ids)
        for is_hint, rows in asked:
            wanted = sort_rows(torch.tensor(rows))
            placed = place_rows(sets, wanted, counts, is_hint=is_hint)
            if is_hint:
                before = {row: model.place(row) for row in rows}
                model.hint(rows)
                placed_ids = {model.place(row) for row in rows if before[row] is None} - {None}
                assert sorted(set(placed.fetch_L.tolist()) - {-1}) == sorted(placed_ids)
            else:
                check_places(model, rows, model.look_up(rows), placed)
            assert all(map(torch.equal, sets, state_of(model)))
    assert counts.tolist() == [*model.counts, 0, 0]


def cache_of(table, *, num_sets: int = 2, num_ways: int = 2, num_overflow: int = 64, **options):
    """A cache of so many sets, its memory poisoned."""
    memory = rows_memory(table)
    row_bytes = memory.shape[1] * memory.element_size()
    cache_bytes = num_overflow * row_bytes + num_sets * num_ways * (row_bytes + 16)
    options |= {"num_ways": num_ways, "num_overflow": num_overflow}
    cache = RowCache(table, cache_bytes, CPU, **options)
    if isinstance(table, RowRecords):
        cache.memory.records_RB.fill_(0xFF)
    assert cache.sets.tags_SW.shape == (num_sets, num_ways)
    return cache


def gathered(cache: RowCache, rows: Tensor, weights: Tensor, width: int, layer: int = 0) -> Tensor:
    out = torch.empty(len(rows), width)
    cache.gather_rows(out, rows, weights, layer)
    return out


@pytest.mark.parametrize("width", [1, 99])
@pytest.mark.parametrize("kind", KINDS)
def test_lookups_equal_those_of_the_table_bit_for_bit(kind, width):
    table = table_of(kind, torch.randn(30, width))
    cache = cache_of(table)
    for _ in range(3):
        rows, weights = rows_of(table, 3, 2, 3), torch.rand(3, 2, 3)
        assert torch.equal(gathered(cache, rows, weights, width), gather_rows(table, rows, weights))
        x, dots = torch.randn(3, width), torch.empty(3, 2, 3)
        cache.row_dots(dots, rows, x, 0)
        assert torch.equal(dots, row_dots(table, rows, x))
    # with few ways and many rows there are hits and rows without a way
    counted = cache.statistics()[0]
    assert counted.hits and counted.misses > 4
    assert counted.bytes_read == counted.misses * cache.row_bytes


@settings(max_examples=10)
@given(st.integers(1, 2), st.lists(st.lists(st.integers(0, 11), min_size=6, max_size=6)))
def test_lookups_are_right_after_any_history(num_ways, asked):
    table = torch.randn(12, 5)
    cache = cache_of(table, num_ways=num_ways, num_overflow=6)
    cache.hint(torch.arange(3), 0)
    for ids in asked[:4]:
        rows, weights = torch.tensor(ids).view(2, 1, 3), torch.rand(2, 1, 3)
        assert torch.equal(gathered(cache, rows, weights, 5), gather_rows(table, rows, weights))


def test_lookups_beyond_the_extra_rows_are_split():
    table = torch.randn(40, 7)
    rows, weights = torch.arange(30).view(5, 2, 3), torch.rand(5, 2, 3)
    cache = cache_of(table, num_overflow=15)
    assert torch.equal(gathered(cache, rows, weights, 7), gather_rows(table, rows, weights))
    counted = cache.statistics()[0]
    assert (counted.lookups, counted.requested_rows, counted.unique_rows) == (1, 30, 30)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 1, 0)])
def test_an_empty_lookup_gives_zeros(shape):
    cache = cache_of(torch.randn(9, 8))
    rows = torch.zeros(shape, dtype=torch.int64)
    assert torch.equal(gathered(cache, rows, torch.zeros(shape), 8), torch.zeros(shape[0], 8))
    cache.hint(rows.flatten()[:0], 0)
    assert not cache.statistics()


def test_an_unused_cache_is_filled_with_the_rows_that_are_read_most():
    table = torch.randn(64, 8)
    # a part of the rows at a time; a single set has no gaps
    cache = cache_of(table, num_sets=1, num_ways=8, num_overflow=3)
    most_read = torch.tensor([40, 3, 9, 63, 0, 17, 5, 22])
    cache.fill(torch.cat([most_read, torch.arange(50, 60)]), 0)
    assert set(cache.sets.tags_SW.flatten().tolist()) == set(most_read.tolist())
    rows, weights = most_read.view(4, 2, 1)[:, :1], torch.rand(4, 1, 1)
    assert torch.equal(gathered(cache, rows, weights, 8), gather_rows(table, rows, weights))
    counted = cache.statistics()[0]
    assert (counted.prefetched, counted.prefetched_used, counted.misses) == (8, 4, 0)


def test_of_rows_that_share_a_set_the_most_read_ones_stay():
    cache = cache_of(torch.randn(64, 8), num_sets=4, num_ways=2, num_overflow=2)
    rows = torch.randperm(64)
    cache.fill(rows, 0)
    cached = {row for row in cache.sets.tags_SW.flatten().tolist() if row >= 0}
    assert set(rows[:2].tolist()) <= cached <= set(rows[:8].tolist())


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_rows_are_fetched_from_past_2_to_the_31(kind):
    last = torch.randn(3, 100)
    table = vast_table(kind, last)
    rows, weights = torch.tensor([[[2, 0, 2, 1]]]), torch.rand(1, 1, 4)
    cache = cache_of(table, num_sets=1, num_ways=4)
    out = gathered(cache, rows + num_rows(table) - 3, weights, 100)
    assert torch.equal(out, gather_rows(table_of(kind, last), rows, weights))


@pytest.mark.parametrize(
    "lay", [lambda wide: wide[..., ::2], lambda wide: wide[..., :1].expand(3, 2, 4)]
)
def test_rows_with_gaps_between_them(lay):
    table, rows = torch.randn(64, 8), lay(torch.randint(0, 64, (3, 2, 8)))
    cache, weights = cache_of(table), torch.rand(3, 2, 4)
    cache.hint(rows, 0)
    assert torch.equal(gathered(cache, rows, weights, 8), gather_rows(table, rows, weights))


def one_token(*ids: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(ids).view(1, 1, -1), torch.ones(1, 1, len(ids))


def test_a_hint_makes_hits_by_layer():
    cache = cache_of(torch.randn(50, 4), num_sets=1, num_ways=4, num_layers=3)
    cache.hint(torch.tensor([[3, 4], [4, 3]]), 1)
    gathered(cache, *one_token(3, 4, 5, 3), 4, layer=1)
    gathered(cache, *one_token(3), 4, layer=2)
    counts = cache.statistics()
    assert set(counts) == {1, 2}
    assert (counts[1].hits, counts[1].misses, counts[1].requested_rows) == (2, 1, 4)
    assert (counts[1].prefetched, counts[1].prefetched_used) == (2, 2)
    assert counts[1].bytes_read == 3 * 16
    assert (counts[2].hits, counts[2].prefetched_used) == (1, 0)


def test_rows_in_use_outlive_rows_read_once():
    cache = cache_of(torch.randn(500, 4), num_sets=1, num_ways=4)
    for _ in range(4):
        gathered(cache, *one_token(1, 2), 4)
    for row in range(10, 40):
        gathered(cache, *one_token(row), 4)
    before = cache.statistics()[0].hits
    gathered(cache, *one_token(1, 2), 4)
    assert cache.statistics()[0].hits == before + 2


@pytest.mark.parametrize("num_overflow", [64, 8])
def test_rows_in_use_outlive_a_hint(num_overflow):
    cache = cache_of(torch.randn(500, 4), num_sets=1, num_ways=4, num_overflow=num_overflow)
    for _ in range(4):
        gathered(cache, *one_token(1, 2), 4)
    cache.hint(torch.arange(10, 40), 0)
    before = cache.statistics()[0]
    assert before.prefetched == 2
    gathered(cache, *one_token(1, 2), 4)
    assert cache.statistics()[0].hits == before.hits + 2


def test_hints_evict_rows_no_longer_in_use():
    cache = cache_of(torch.randn(500, 4), num_sets=1, num_ways=2)
    for _ in range(4):
        gathered(cache, *one_token(1, 2), 4)
    for _ in range(4):
        assert {1, 2} == set(cache.sets.tags_SW.flatten().tolist())
        cache.hint(torch.tensor([10, 11]), 0)
    assert {10, 11} == set(cache.sets.tags_SW.flatten().tolist())


def test_rows_no_longer_in_use_are_evicted():
    cache = cache_of(torch.randn(500, 4), num_sets=1, num_ways=2)
    for _ in range(4):
        gathered(cache, *one_token(1, 2), 4)
    for row in (10, 11, 12):
        gathered(cache, *one_token(row, row + 100), 4)
    assert not {1, 2} & set(cache.sets.tags_SW.flatten().tolist())


def test_the_cache_keeps_to_its_memory_limit():
    table = torch.zeros(1000, 8)
    least = 10 * 32 + 4 * (32 + 16)
    with pytest.raises(ValueError, match=f"table_cache: {least - 1} .* overflow rows need {least}"):
        RowCache(table, least - 1, CPU, num_ways=4, num_overflow=10)
    for given_bytes in (least, least + 191, least + 192, 9999):
        cache = RowCache(table, given_bytes, CPU, num_ways=4, num_overflow=10)
        tensors = (cache.memory, *cache.sets)
        assert given_bytes - 192 < sum(tensor.nbytes for tensor in tensors) <= given_bytes


@pytest.mark.parametrize(("num_rows", "num_sets"), [(1, 1), (16, 1), (17, 2), (100, 7)])
def test_a_cache_of_the_stated_size_holds_the_rows(num_rows, num_sets):
    table = torch.zeros(100, 4)
    cache = RowCache(table, host_cache_bytes(num_rows, 16), CPU)
    assert cache.capacity == num_sets * 16
    if num_sets > 1:
        assert RowCache(table, host_cache_bytes(num_rows, 16) - 1, CPU).capacity < num_rows


def test_there_are_no_more_sets_than_the_rows_need():
    cache = RowCache(torch.zeros(9, 8), 2**20, CPU, num_ways=4, num_overflow=10)
    assert cache.sets.tags_SW.shape == (3, 4)


@pytest.mark.parametrize("maker", ["empty", "full", "zeros_like", "zeros"])
def test_too_little_device_memory_is_an_error(monkeypatch, maker):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    table = torch.zeros(9, 8)
    monkeypatch.setattr(torch, maker, full)
    with pytest.raises(ValueError, match="table_cache: cannot allocate 4096 bytes on cpu"):
        RowCache(table, 4096, CPU, num_ways=4, num_overflow=10)


def test_rows_at_an_unaligned_address_are_fetched():
    table = torch.randn(121).bfloat16()[1:].view(30, 4)
    rows, weights = rows_of(table, 3, 2, 3), torch.rand(3, 2, 3)
    out = gathered(cache_of(table), rows, weights, 4)
    assert torch.equal(out, gather_rows(table, rows, weights))


def test_wrong_tables_and_lookups_are_refused():
    with pytest.raises(ValueError, match="table: the Triton kernels support"):
        RowCache(torch.zeros(4, 3, dtype=torch.float64), 2**20, CPU)
    with pytest.raises(ValueError, match="table: expected contiguous rows"):
        RowCache(torch.zeros(4, 6)[:, :3], 2**20, CPU)
    for num_ways in (0, 3):
        with pytest.raises(ValueError, match=f"num_ways: {num_ways} is not a power of two"):
            RowCache(torch.zeros(4, 6), 2**20, CPU, num_ways=num_ways)
