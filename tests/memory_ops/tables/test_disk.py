"""The disk tier: sums equal to those in memory for any cache size, and errors of failed reads."""

import contextlib
import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import ReadFault
from memory_ops.native.row_fetcher import (
    ALL_THERE,
    FINISH,
    NO_ROOM,
    OUTSIDE,
    RELEASE,
    START,
    RowFetcher,
)
from memory_ops.row_formats import quantize_rows
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import TableReadError

ROWS, WIDTH, OFFSET = 200, 24, 4096
READERS = [{}, {"threads": 3}, {"is_direct": False}]
FORMATS = [torch.float32, torch.bfloat16, "int8", "int4", "int4_row", "fp8"]

pytestmark = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")


def rows_of(row_format):
    """(rows in memory, the same rows as bytes of a file)."""
    torch.manual_seed(0)
    values = torch.randn(ROWS, WIDTH)
    if isinstance(row_format, torch.dtype):
        rows = values.to(row_format)
        return rows, rows.view(torch.uint8)
    records = quantize_rows(values, row_format)
    return records, records.records_RB


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = {}
    for row_format in FORMATS:
        rows, content = rows_of(row_format)
        file = tmp_path_factory.mktemp("tables") / "table"
        file.write_bytes(b"x" * OFFSET + content.numpy().tobytes())
        made[row_format] = file, rows, content.shape[1]
    return made


def disk_table(files, row_format=torch.float32, slots=40, **options):
    file, _, size = files[row_format]
    return DiskTable(
        file, OFFSET, (ROWS, WIDTH), row_format, row_cache_bytes(slots, size, ROWS), **options
    )


def reads(num_tokens=5, per_token=(2, 3), most=ROWS):
    return torch.randint(most, (num_tokens, *per_token)), torch.rand(num_tokens, *per_token)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("row_format", FORMATS)
@settings(max_examples=12)
@given(slots=st.sampled_from([6, 13, 250]), sizes=st.lists(st.integers(0, 40), max_size=6))
def test_sums_and_products_equal_those_of_a_table_in_memory(
    files, reader, row_format, slots, sizes
):
    table, wanted = (
        disk_table(files, row_format, slots, **reader),
        DeviceTable(files[row_format][1]),
    )
    for number, size in enumerate(sizes):
        rows, weights = reads(size)
        if number % 2:
            table.hint(rows[: size // 2])
        found = table.start(rows, weights).finish()
        torch.testing.assert_close(found, wanted.start(rows, weights).finish(), rtol=0, atol=0)
        x = torch.randn(size, WIDTH)
        found = table.start_dots(rows, x).finish()
        torch.testing.assert_close(found, wanted.start_dots(rows, x).finish(), rtol=0, atol=0)


@pytest.mark.parametrize("reader", READERS)
def test_repeated_rows_are_read_once(files, reader):
    table = disk_table(files, slots=100, **reader)
    rows, weights = torch.arange(60).view(10, 2, 3), torch.ones(10, 2, 3)
    repeated = rows.repeat(2, 1, 1)
    table.start(repeated, weights.repeat(2, 1, 1)).finish()
    first = table.statistics()[0]
    assert (first.requested_rows, first.lookups, first.unique_rows) == (120, 1, 60)
    assert (first.misses, first.hits) == (60, 0) and first.bytes_read >= 60 * WIDTH * 4
    table.start(rows, weights).finish()
    second = table.statistics()[0]
    assert (second.unique_rows, second.misses, second.hits) == (120, 60, 60)
    assert second.bytes_read == first.bytes_read


def test_hot_rows_survive_a_scan(files):
    table = disk_table(files, slots=40)

    def read(*wanted):
        rows = torch.tensor(wanted).view(-1, 1, 1)
        table.start(rows, torch.ones(rows.shape)).finish()

    hot = range(10)
    for _ in range(4):
        read(*hot)
    for row in range(50, 100):
        read(row)
    before = table.statistics()[0].misses
    read(*hot)
    assert table.statistics()[0].misses == before


def test_hinted_rows_are_prefetched_and_counted(files):
    table = disk_table(files, slots=100)
    table.hint(torch.arange(20))
    rows = torch.arange(10, 30).view(20, 1, 1)
    table.start(rows, torch.ones(20, 1, 1)).finish()
    counted = table.statistics()[0]
    assert (counted.prefetched, counted.prefetched_used) == (20, 10)
    assert counted.hits + counted.late == 10 and counted.misses == 10
    table.hint(torch.tensor([-1, ROWS, 2**40]))
    assert table.statistics()[0].prefetched == 20


@pytest.mark.parametrize("reader", READERS)
def test_a_cache_begins_with_the_rows_that_are_read_most(files, reader):
    table = disk_table(files, slots=40, **reader)
    table.fill_cache(torch.tensor([5, 5, -1, ROWS, 2**40]))
    table.fill_cache(torch.arange(100, 10, -1))  # more rows than slots
    assert table.statistics() == {}
    in_memory = torch.tensor([5, *range(100, 61, -1)]).view(-1, 1, 1)
    found = table.start(in_memory, torch.ones(in_memory.shape)).finish()
    wanted = DeviceTable(files[torch.float32][1])
    expected = wanted.start(in_memory, torch.ones(in_memory.shape)).finish()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    counted = table.statistics()[0]
    assert (counted.hits, counted.misses, counted.prefetched) == (40, 0, 0)
    # a full cache takes no more
    table.fill_cache(torch.tensor([1, 2]))
    table.start(torch.tensor([[[1]]]), torch.ones(1, 1, 1)).finish()
    assert table.statistics()[0].misses == 1


@pytest.mark.parametrize("reader", READERS)
def test_a_cache_that_cannot_be_filled_is_read_later(files, reader):
    fault = ReadFault(every=3, result=-errno.EIO)
    table = disk_table(files, slots=100, fault=fault, **reader)
    table.fill_cache(torch.arange(90))
    assert table.fault is None
    for row in range(90):
        with contextlib.suppress(TableReadError):
            table.start(torch.tensor([[[row]]]), torch.ones(1, 1, 1)).finish()
    counted = table.statistics()[0]
    assert (counted.hits, counted.misses) == (60, 30)


def test_two_overlapping_lookups_get_their_own_rows(files):
    table, wanted = disk_table(files, slots=60), DeviceTable(files[torch.float32][1])
    first, second = reads(9), reads(9)
    begun = [table.start(*first), table.start(*second)]
    for lookup, own in zip(reversed(begun), (second, first), strict=True):
        torch.testing.assert_close(lookup.finish(), wanted.start(*own).finish(), rtol=0, atol=0)


def test_dropped_lookups_free_their_slots(files):
    table = disk_table(files, slots=6)
    for _ in range(20):
        table.start(*reads(1))
    rows, weights = reads(4)
    wanted = DeviceTable(files[torch.float32][1]).start(rows, weights).finish()
    torch.testing.assert_close(table.start(rows, weights).finish(), wanted, rtol=0, atol=0)


def test_a_lookup_without_free_slots_reads_once_slots_are_free(files):
    table, stored = disk_table(files, slots=6), files[torch.float32][1]
    rows = torch.arange(24).view(4, 2, 3)
    first = table.start(rows[:1], torch.ones(1, 2, 3))
    second = table.start(rows[1:], torch.ones(3, 2, 3))
    torch.testing.assert_close(first.finish(), stored[rows[:1]].sum((1, 2)))
    torch.testing.assert_close(second.finish(), stored[rows[1:]].sum((1, 2)))
    counted = table.statistics()[0]
    assert (counted.lookups, counted.requested_rows, counted.misses) == (2, 24, 24)


def test_a_cache_too_small_for_one_token_is_an_error(files):
    table = disk_table(files, slots=5)
    rows = torch.arange(6).view(1, 2, 3)
    with pytest.raises(TableReadError, match="one token's rows do not fit in memory"):
        table.start(rows, torch.ones(1, 2, 3)).finish()
    torch.testing.assert_close(
        table.start(rows[:, :1], torch.ones(1, 1, 3)).finish()[0],
        files[torch.float32][1][:3].sum(0),
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("result", "why"), [(-errno.EIO, "Input/output error"), (0, "the file ends before this row")]
)
def test_a_failed_read_fails_only_its_lookup(files, reader, result, why):
    wanted = DeviceTable(files[torch.float32][1])
    table = disk_table(files, slots=30, fault=ReadFault(40, result), **reader)
    failed = 0
    for _ in range(60):
        rows, weights = reads(3)
        try:
            found = table.start(rows, weights).finish()
        except TableReadError as error:
            failed += 1
            assert why in str(error) and "table: row " in str(error)
            continue
        torch.testing.assert_close(found, wanted.start(rows, weights).finish(), rtol=0, atol=0)
    # short reads are retried
    assert failed == 0 if result == 0 else 0 < failed < 40


def test_repeated_short_reads_fail(files):
    table = disk_table(files, fault=ReadFault(1, 8))
    with pytest.raises(TableReadError, match="the file ends before this row"):
        table.start(*reads(1)).finish()


def changed(path, change):
    """A table whose file is changed after a first lookup."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    table = DiskTable(copy, OFFSET, (ROWS, WIDTH), torch.float32, 2**20)
    table.start(*reads(3)).finish()
    os.utime(copy, ns=(0, 0))
    change(copy)
    return table


@pytest.mark.parametrize(
    "change",
    [
        lambda file: os.truncate(file, OFFSET),
        lambda file: file.write_bytes(b"x" * file.stat().st_size),
    ],
)
def test_a_changed_file_is_an_error(files, change):
    table = changed(files[torch.float32][0], change)
    with pytest.raises(TableReadError, match="the file changed after it was opened"):
        table.start(*reads(3))


def test_replacing_the_file_by_another_changes_nothing(files):
    path = files[torch.float32][0]
    copy = path.with_name("first")
    copy.write_bytes(path.read_bytes())
    table = DiskTable(
        copy, OFFSET, (ROWS, WIDTH), torch.float32, row_cache_bytes(6, WIDTH * 4, ROWS)
    )
    path.with_name("second").write_bytes(b"")
    os.replace(path.with_name("second"), copy)
    rows, weights = reads(9)
    wanted = DeviceTable(files[torch.float32][1]).start(rows, weights).finish()
    torch.testing.assert_close(table.start(rows, weights).finish(), wanted, rtol=0, atol=0)


def test_kernels_read_slots_that_a_fetcher_fills(files):
    table, stored = disk_table(files, slots=6), files[torch.float32][1]
    source = table.row_source(3)
    assert table.fetched_capacity == table.num_slots == 6 and source.rows is table.slots
    fetcher = RowFetcher.from_address(source.fetcher_address)
    rows, slots = torch.tensor([[7, 3], [7, 9]]), torch.zeros(2, 2, dtype=torch.int64)
    start, finish, own = START(fetcher.start), FINISH(fetcher.finish), fetcher.own
    assert start(own, rows.data_ptr(), 2, 2, 1, fetcher.layer, slots.data_ptr()) == 2
    assert finish(own, slots.data_ptr(), 4, fetcher.layer, None) == ALL_THERE
    assert torch.equal(source.rows[slots], stored[rows])
    before = table.statistics()
    source.count(rows)  # no effect: the fetcher has counted them
    assert table.statistics() == before and before[3].requested_rows == 4
    RELEASE(fetcher.release)(own, slots.data_ptr(), 4)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (NO_ROOM, "one token's rows do not fit in memory: increase table_cache"),
        (OUTSIDE, "row 7 is outside the table"),
        (0, "row 7: the file ends before this row"),
        (errno.EIO, "row 7: Input/output error"),
    ],
)
def test_read_errors_of_a_row_source_name_the_row_and_the_reason(files, error, why):
    table = disk_table(files)
    assert str(table.row_source(0).read_error(7, error)) == f"{table.file}: {why}"


def test_a_row_source_refuses_a_changed_file(files):
    source = disk_table(files).row_source(0)
    source.check()
    table = changed(files[torch.float32][0], lambda file: os.truncate(file, OFFSET))
    with pytest.raises(TableReadError, match="the file changed after it was opened"):
        table.row_source(0).check()


def test_impossible_files_caches_and_rows_are_refused(files, tmp_path):
    file, _, size = files[torch.float32]
    with pytest.raises(TableReadError, match="No such file"):
        DiskTable(tmp_path / "none", 0, (1, 1), torch.float32, 100)
    with pytest.raises(TableReadError, match="ends before the last row"):
        DiskTable(file, OFFSET, (ROWS + 1, WIDTH), torch.float32, 10_000)
    least = row_cache_bytes(1, size, ROWS)
    with pytest.raises(ValueError, match=f"table_cache: {least - 1} bytes are too small"):
        DiskTable(file, OFFSET, (ROWS, WIDTH), torch.float32, least - 1)
    table = disk_table(files)
    for wrong in (-1, ROWS):
        with pytest.raises(IndexError, match=f"rows: {wrong} is outside the table"):
            table.start(torch.tensor([[[0, wrong]]]), torch.ones(1, 1, 2))
    table.start(*reads(40)).finish()


def test_operands_that_the_device_tier_refuses_are_refused(files):
    table, other = disk_table(files), DeviceTable(files[torch.float32][1])
    rows, weights = reads(2)
    for own in (table, other):
        with pytest.raises(ValueError, match="int64"):
            own.start(rows.int(), weights).finish()
        with pytest.raises(ValueError, match="rows and weights"):
            own.start(rows, torch.rand(3, 2, 3)).finish()
        with pytest.raises(ValueError, match="rows and x"):
            own.start_dots(rows, torch.rand(2, WIDTH + 1)).finish()
    with pytest.raises(ValueError, match="expected int64"):
        table.hint(rows.int())
    table.close()
    for call in (lambda: table.hint(rows), table.statistics):
        with pytest.raises(ValueError, match="table: the table is closed"):
            call()


def test_a_failed_lookup_frees_its_slots_at_once(files):
    table = disk_table(files, slots=6, fault=ReadFault(5, -errno.EIO))
    with pytest.raises(TableReadError) as held:
        table.start(*reads(1)).finish()
    rows, weights = reads(1)
    for _ in range(4):
        try:
            table.start(rows, weights).finish()
        except TableReadError as error:
            assert "do not fit" not in str(error)
    assert held.value is not None


def test_a_split_lookup_counts_each_row_once(files):
    table = disk_table(files, slots=9)
    rows = torch.arange(60).view(15, 2, 2)
    table.start(rows, torch.ones(15, 2, 2)).finish()
    counted = table.statistics()[0]
    assert (counted.unique_rows, counted.hits + counted.late + counted.misses) == (60, 60)
    assert counted.hits == 0


@pytest.mark.parametrize("reader", READERS)
def test_lookups_of_more_rows_than_reads_in_flight_are_complete(tmp_path, reader):
    values, order = torch.randn(3000, WIDTH), torch.randperm(3000)
    (tmp_path / "table").write_bytes(values.numpy().tobytes())
    cache_bytes = row_cache_bytes(2500, WIDTH * 4, 3000)
    table = DiskTable(tmp_path / "table", 0, (3000, WIDTH), torch.float32, cache_bytes, **reader)
    parts = []
    table.watch(lambda: parts.append(table.statistics()[7].misses))
    rows = order.view(30, 10, 10)
    found = table.start(rows, torch.ones(rows.shape), layer=7).finish()
    torch.testing.assert_close(found, values[rows].sum((1, 2)))
    # a lookup larger than the cache is split, and watchers are called for each part
    assert parts == [2500, 3000]


@pytest.mark.parametrize("reader", READERS)
def test_reads_proceed_without_a_waiting_caller(tmp_path, reader):
    values, size = torch.randn(4000, WIDTH), WIDTH * 4
    (tmp_path / "table").write_bytes(values.numpy().tobytes())
    cache_bytes = row_cache_bytes(4000, size, 4000)
    table = DiskTable(tmp_path / "table", 0, (4000, WIDTH), torch.float32, cache_bytes, **reader)
    rows = torch.randperm(4000).view(40, 10, 10)
    first = table.start(rows[:20], torch.ones(20, 10, 10))
    second = table.start(rows[20:], torch.ones(20, 10, 10))
    # but for the last ones, which are left to whoever waits
    while table.statistics()[0].bytes_read < 3000 * max(size, table.location.alignment):
        os.sched_yield()
    torch.testing.assert_close(second.finish(), values[rows[20:]].sum((1, 2)))
    torch.testing.assert_close(first.finish(), values[rows[:20]].sum((1, 2)))


@pytest.mark.parametrize("reader", READERS)
def test_a_table_can_be_closed_during_reads(tmp_path, reader):
    values = torch.randn(4000, WIDTH)
    (tmp_path / "table").write_bytes(values.numpy().tobytes())
    cache_bytes = row_cache_bytes(4000, WIDTH * 4, 4000)
    for _ in range(5):
        table = DiskTable(
            tmp_path / "table", 0, (4000, WIDTH), torch.float32, cache_bytes, **reader
        )
        lookup = table.start(torch.randperm(4000).view(40, 10, 10), torch.ones(40, 10, 10))
        table.close()
        with pytest.raises(ValueError, match="is closed"):
            lookup.finish()


def test_slots_of_a_dropped_lookup_are_free_once_its_reads_end(files):
    table = disk_table(files, slots=60)
    for first in (0, 60, 120):
        rows = torch.arange(first, first + 60).view(1, 6, 10)
        table.start(rows, torch.ones(1, 6, 10))  # drops the lookup at once
    wanted = DeviceTable(files[torch.float32][1])
    rows, weights = torch.arange(140, 200).view(1, 6, 10), torch.rand(1, 6, 10)
    found = table.start(rows, weights).finish()
    torch.testing.assert_close(found, wanted.start(rows, weights).finish(), rtol=0, atol=0)


def test_each_layer_has_its_own_counts(files):
    table = disk_table(files, slots=100)
    rows, weights = torch.arange(6).view(1, 2, 3), torch.ones(1, 2, 3)
    table.start(rows, weights, layer=3).finish()
    table.hint(torch.arange(6, 9), layer=5)
    table.start(torch.arange(9).view(1, 3, 3), torch.ones(1, 3, 3), layer=5).finish()
    counts = table.statistics()
    assert set(counts) == {3, 5}
    assert (counts[3].unique_rows, counts[3].misses, counts[3].prefetched) == (6, 6, 0)
    assert (counts[5].unique_rows, counts[5].hits + counts[5].late, counts[5].misses) == (9, 9, 0)
    assert (counts[5].prefetched, counts[5].prefetched_used) == (3, 3)
    total = TableStatistics.sum(counts.values())
    assert (total.requested_rows, total.unique_rows) == (15, 15)


def test_a_hint_during_a_lookup_changes_nothing(files):
    wanted = DeviceTable(files[torch.float32][1])
    for _ in range(30):
        # short reads are too rare to hit the same row until it fails
        table = disk_table(files, slots=63, fault=ReadFault(37, 8))
        rows, weights = torch.randperm(ROWS)[:128].view(4, 4, 8), torch.rand(4, 4, 8)
        lookup = table.start(rows, weights)
        table.hint(rows[2])
        table.hint(rows[1])
        torch.testing.assert_close(
            lookup.finish(), wanted.start(rows, weights).finish(), rtol=0, atol=0
        )


def test_hints_do_not_evict_rows_in_use(files):
    table = disk_table(files, slots=20)
    rows = torch.arange(20).view(1, 4, 5)
    for _ in range(3):
        table.start(rows, torch.ones(1, 4, 5)).finish()
    table.hint(torch.arange(50, 100))
    before = table.statistics()[0]
    table.start(rows, torch.ones(1, 4, 5)).finish()
    after = table.statistics()[0]
    assert (before.prefetched, after.misses - before.misses) == (0, 0)


def test_a_hint_without_a_free_slot_does_not_block_later_hints(files):
    table = disk_table(files, slots=20)

    def read(rows, times):
        for _ in range(times):
            table.start(rows.view(1, 4, 5), torch.ones(1, 4, 5)).finish()

    often, seldom, hot = torch.arange(20), torch.arange(20, 40), torch.arange(40, 60)
    read(hot, 40)
    read(often, 8)
    table.hint(torch.cat([seldom, hot]))
    # unused rows evict no often-used row; more often used rows do
    assert table.statistics()[0].prefetched == 20
    before = table.statistics()[0].misses
    read(hot, 1)
    assert table.statistics()[0].misses == before


def test_hot_rows_are_evicted_in_the_end(tmp_path):
    values = torch.randn(6000, 2)
    (tmp_path / "table").write_bytes(values.numpy().tobytes())
    table = DiskTable(
        tmp_path / "table", 0, (6000, 2), torch.float32, row_cache_bytes(5000, 8, 6000)
    )
    hot = torch.arange(5000).view(50, 10, 10)
    for _ in range(4):
        table.start(hot, torch.ones(hot.shape)).finish()
    rows = torch.arange(4900, 6000).view(110, 10, 1)
    found = table.start(rows, torch.ones(rows.shape)).finish()
    torch.testing.assert_close(found, values[rows].sum((1, 2)))
