"""Tables on disk behind a GPU, on a stream that works late: rows, waits, graphs, errors, counts."""

import pytest
import torch
from torch import Tensor

from memory_ops import reference
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import ReadFault
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from memory_ops.tables.gpu_disk import GpuDiskTable, gpu_disk_table
from memory_ops.tables.host_cache_size import host_cache_bytes
from memory_ops.tables.host_calls import HostCalls
from memory_ops.tables.row_cache import RowCache, rows_memory
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import TableReadError
from tests.memory_ops.late_stream import LateStream, PromptStream
from tests.memory_ops.table_kinds import KINDS, check_close, exact_values, rows_of, table_of

pytestmark = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")

CPU = torch.device("cpu")
NUM_ROWS, WIDTH, OVERFLOW = 40, 33, 12
EIO = 5


def gpu_disk(
    folder,
    table,
    stream: LateStream,
    *,
    slots: int = 8,
    cached: int = 4,
    calls: HostCalls | None = None,
    overflow: int = OVERFLOW,
    num_layers: int = 1,
    **options,
) -> GpuDiskTable:
    """A table whose rows are in a file: ``slots`` rows fit in host memory, ``cached`` on the
    device."""
    memory_RC = rows_memory(table)
    file = folder / f"table-{len(list(folder.iterdir()))}"
    file.write_bytes(memory_RC.contiguous().view(torch.uint8).numpy().tobytes())
    size = memory_RC.shape[1] * memory_RC.itemsize
    num_rows = len(memory_RC)
    row_format = table.dtype if isinstance(table, Tensor) else table.row_format
    width = table.shape[1] if isinstance(table, Tensor) else table.value_dim
    cache_bytes = row_cache_bytes(slots, size, num_rows)
    disk = DiskTable(file, 0, (num_rows, width), row_format, cache_bytes, **options)
    cache = RowCache(
        disk.slots,
        host_cache_bytes(cached, size, num_ways=2, num_overflow=overflow),
        CPU,
        num_layers=num_layers,
        num_ways=2,
        num_overflow=overflow,
        num_rows=num_rows,
    )
    return GpuDiskTable(
        disk,
        cache,
        lambda: stream,
        calls or HostCalls(),
        num_hints=8,
        most_references=overflow,
    )


class Caller:
    """A fake model: its stream computes operands late, and copies the results of lookups."""

    def __init__(self, table: GpuDiskTable, exact_RV: Tensor, stream: LateStream) -> None:
        self.table, self.exact_RV, self.stream = table, exact_RV, stream
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (found, expected)

    def later(self, right: Tensor, wrong: float) -> Tensor:
        """A tensor that holds ``wrong`` until the stream has computed ``right``."""
        tensor = torch.full_like(right, wrong)
        self.stream.run(lambda: tensor.copy_(right))
        return tensor

    def look_up(self, tokens: int = 2, *, dots: bool = False, layer: int = 0) -> None:
        right = rows_of(self.exact_RV, tokens, 2, 3)
        rows = self.later(right, 0)
        if dots:
            operand = torch.randn(tokens, self.exact_RV.shape[1])
            exact = reference.row_dots(self.exact_RV, right, operand.double())
            lookup = self.table.start_dots(rows, self.later(operand, torch.nan), layer)
        else:
            operand = torch.rand(tokens, 2, 3)
            exact = reference.gather_rows(self.exact_RV, right, operand.double())
            lookup = self.table.start(rows, self.later(operand, torch.nan), layer)
        result = lookup.finish()
        copied = torch.full_like(result, torch.nan)
        self.stream.run(lambda: copied.copy_(result))
        self.pairs.append((copied, exact))

    def check(self) -> None:
        self.stream.finish()
        for found, exact in self.pairs:
            check_close(found, exact, 6)

    def is_right(self) -> bool:
        try:
            self.check()
        except (AssertionError, IndexError, TableReadError):
            return False
        return True


def run_model(folder, ignored: int = -1) -> tuple[LateStream, Caller]:
    """Lookups of one or several parts, whose rows do not fit in host memory at once."""
    stream, table = LateStream(ignored), torch.randn(NUM_ROWS, WIDTH)
    caller = Caller(gpu_disk(folder, table, stream, slots=7), table.double(), stream)
    for tokens in (2, 3, 1):
        caller.look_up(tokens)
    caller.look_up(dots=True)
    return stream, caller


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_right_while_both_caches_evict(tmp_path, kind):
    stream, table = LateStream(), table_of(kind, torch.randn(NUM_ROWS, WIDTH))
    caller = Caller(gpu_disk(tmp_path, table, stream), exact_values(table), stream)
    for number in range(4):
        caller.look_up(number % 2 + 1, dots=number % 2 == 1)
    caller.check()


def test_a_late_device_gets_the_right_rows(tmp_path):
    stream, table = LateStream(), table_of("int8", torch.randn(NUM_ROWS, WIDTH))
    caller = Caller(gpu_disk(tmp_path, table, stream, slots=5), exact_values(table), stream)
    caller.look_up()
    caller.look_up(1)
    caller.check()
    assert stream.waits > 2


@pytest.mark.slow
def test_no_wait_of_the_host_can_be_left_out(tmp_path):
    torch.manual_seed(0)
    stream, caller = run_model(tmp_path)
    waits = stream.waits
    assert caller.is_right()
    for ignored in range(waits):
        torch.manual_seed(0)
        try:
            _, caller = run_model(tmp_path, ignored)
        except (IndexError, TableReadError):
            continue
        assert not caller.is_right(), ignored


def test_nothing_waits_to_recover_from_a_finished_lookup(tmp_path):
    stream, table = LateStream(), torch.randn(NUM_ROWS, WIDTH)
    caller = Caller(gpu_disk(tmp_path, table, stream), table.double(), stream)
    caller.look_up()
    waits = stream.waits
    caller.table.recover()
    assert (stream.waits, stream.is_idle()) == (waits, False)
    caller.look_up()
    caller.check()


def test_lists_of_rows_to_copy_are_aligned_alike(tmp_path, monkeypatch):
    # Triton compiles a kernel once more for another alignment
    places: list[int] = []
    stream, table = PromptStream(), torch.randn(NUM_ROWS, WIDTH)
    held = gpu_disk(tmp_path, table, stream, slots=5, cached=2, overflow=11)
    fetch = held._cache.fetch

    def noted(*lists: Tensor) -> None:
        places.extend(one.data_ptr() % 16 for one in lists)
        fetch(*lists)

    monkeypatch.setattr(held._cache, "fetch", noted)
    rows, weights = torch.arange(6).view(1, 1, 6), torch.ones(1, 1, 6)
    found = held.start(rows, weights).finish()
    # five rows, which fill host memory, and one more
    assert places == [0, 0] * 2
    torch.testing.assert_close(found, reference.gather_rows(table, rows, weights))


def replayed_lookups(folder, *, slots: int) -> Caller:
    """A captured lookup of two parts, replayed with other rows each time."""
    stream, table = LateStream(), torch.randn(NUM_ROWS, WIDTH)
    held = gpu_disk(folder, table, stream, slots=slots)
    caller = Caller(held, table.double(), stream)
    rows, weights = torch.zeros(3, 2, 3, dtype=torch.int64), torch.rand(3, 2, 3)

    def step() -> Tensor:
        held.hint(rows)
        return held.start(rows, weights).finish()

    out, replay = stream.capture(held.calls, step)
    for _ in range(3):
        right = rows_of(table, 3, 2, 3)
        copied = torch.full_like(out, torch.nan)
        held.recover()
        stream.run(lambda right=right: rows.copy_(right))
        replay()
        stream.run(lambda copied=copied: copied.copy_(out))
        exact = reference.gather_rows(caller.exact_RV, right, weights.double())
        caller.pairs.append((copied, exact))
    return caller


@pytest.mark.slow
@pytest.mark.parametrize("slots", [40, 5])
def test_replays_of_graphs_read_rows_and_hints_of_their_own_step(tmp_path, slots):
    caller = replayed_lookups(tmp_path, slots=slots)
    caller.check()
    (counts,) = caller.table.statistics().values()
    assert (counts.lookups, counts.requested_rows) == (3, 3 * 18)
    assert counts.prefetched and counts.prefetched_used


def test_counts_tell_both_caches_from_the_file(tmp_path):
    stream, table = PromptStream(), torch.randn(NUM_ROWS, WIDTH)
    # the cache on the device has one set of two rows
    held = gpu_disk(tmp_path, table, stream, slots=40, cached=2, num_layers=3)
    weights = torch.ones(1, 1, 4)

    def read(*ids: int) -> None:
        rows = torch.tensor(ids).view(1, 1, 4)
        exact = reference.gather_rows(table, rows, weights)
        torch.testing.assert_close(held.start(rows, weights, 2).finish(), exact)

    read(1, 2, 3, 3)
    read(1, 2, 3, 4)
    size = WIDTH * 4
    counts = held.statistics()[2]
    assert counts == TableStatistics(
        requested_rows=8,
        lookups=2,
        unique_rows=7,
        hits=3,
        misses=4,
        bytes_read=counts.bytes_read,
        stall_seconds=counts.stall_seconds,
    )
    assert counts.bytes_read >= 4 * size
    held.fill_cache(torch.tensor([9]))
    read(9, 1, 9, 2)
    assert held.statistics()[2].misses == 4
    held.close()


def test_a_read_error_ends_one_lookup_and_spoils_no_row(tmp_path):
    stream, table = PromptStream(), torch.randn(NUM_ROWS, WIDTH)
    fault = ReadFault(every=3, result=-EIO)
    held = gpu_disk(tmp_path, table, stream, slots=40, cached=8, fault=fault)
    weights, failed = torch.ones(1, 1, 4), 0
    marks: list[int] = []
    held.watch(lambda: marks.append(1))
    for first in range(0, 12, 2):
        rows = torch.arange(first, first + 4).view(1, 1, 4)
        try:
            found = held.start(rows, weights).finish()
        except TableReadError as error:
            assert str(held.disk.file) in str(error) and "Input/output error" in str(error)
            failed += 1
            # the cache has places for these rows, but not the rows
            with pytest.raises(ValueError, match="finish the earlier lookup"):
                held.start(rows, weights)
            held.recover()
            continue
        torch.testing.assert_close(found, reference.gather_rows(table, rows, weights))
    assert failed and marks and held.fault is None


def test_a_changed_file_is_lost(tmp_path):
    stream, table = PromptStream(), torch.randn(NUM_ROWS, WIDTH)
    held = gpu_disk(tmp_path, table, stream)
    held.disk.file.write_bytes(b"x" * (NUM_ROWS * WIDTH * 4))
    with pytest.raises(TableReadError, match="the file changed"):
        held.start(torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1)).finish()
    assert held.fault is not None and "the file changed" in held.fault


def test_wrong_lookups_are_refused(tmp_path):
    held = gpu_disk(tmp_path, torch.randn(9, 4), PromptStream())
    assert (held.num_rows, held.value_dim, held.tier) == (9, 4, "disk")
    assert held.fetched_capacity == 8 and held.row_source(0) is None and not held.statistics()
    rows, weights = torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="rows and weights"):
        held.start(rows, weights[:, :, :1])
    with pytest.raises(ValueError, match="rows and x"):
        held.start_dots(rows, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"layer: 1 is outside \[0, 1\)"):
        held.start(rows, weights, 1)
    with pytest.raises(ValueError, match="rows: expected int64"):
        held.hint(rows.int())
    with pytest.raises(ValueError, match="weights: tables on disk do not support gradients"):
        held.start(rows, weights.clone().requires_grad_())
    empty = held.start(rows[:0], weights[:0]).finish()
    assert empty.shape == (0, 4)
    with pytest.raises(IndexError, match="rows: 9 is outside the table"):
        held.start(rows + 9, weights).finish()
    with pytest.raises(ValueError, match="table_tier: disk needs a GPU, not cpu"):
        gpu_disk_table(held.disk, 2**20, CPU, HostCalls())
