"""The disk tier under faults: it retries transient errors and reports lasting ones."""

import ctypes
import errno
import os
import struct
import threading

import pytest
import torch

from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import ReadFault
from memory_ops.tables import disk
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from memory_ops.tables.value_table import TableReadError

ROWS, WIDTH = 200, 24
READERS = [{}, {"threads": 3}, {"is_direct": False}]
_IO_URING_SETUP = 425

pytestmark = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")


@pytest.fixture(scope="module")
def values():
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH)


@pytest.fixture(scope="module")
def file(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("tables") / "table"
    file.write_bytes(values.numpy().tobytes())
    return file


def table_of(file, slots=40, **options):
    cache_bytes = row_cache_bytes(slots, WIDTH * 4, ROWS)
    return DiskTable(file, 0, (ROWS, WIDTH), torch.float32, cache_bytes, **options)


def sums(table, first, count=6):
    rows = torch.arange(first, first + count).view(1, 1, count)
    return table.start(rows, torch.ones(rows.shape)).finish()[0]


@pytest.fixture
def log(caplog):
    """The log of a process that has not logged yet that threads read."""
    disk._log_threads.cache_clear()
    yield caplog
    disk._log_threads.cache_clear()


def refuse_rings(error):
    """Make io_uring_setup fail in this thread and in the threads that it starts."""
    program = [
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 0, 1, _IO_URING_SETUP),  # if it is another one, skip the next instruction
        (0x06, 0, 0, 0x00050000 | error),  # return the error
        (0x06, 0, 0, 0x7FFF0000),  # allow the call
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    return libc.prctl(22, 2, filters, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


@pytest.mark.parametrize(
    "error", [errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOMEM, errno.EMFILE]
)
def test_without_io_uring_threads_read_and_one_log_line_says_so(file, values, log, error):
    found = []

    def run():
        if not refuse_rings(error):
            return
        for _ in range(2):
            found.append(sums(table_of(file), 0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if not found:
        pytest.skip("this kernel takes no seccomp filter")
    for one in found:
        torch.testing.assert_close(one, values[:6].sum(0))
    assert log.messages == [
        f"no io_uring ({os.strerror(error)}): 16 threads read disk tables instead"
    ]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EBUSY, errno.ENOMEM])
def test_transient_submit_errors_are_retried(file, values, reader, error):
    table = table_of(file, fault=ReadFault(submits=6, submit_error=error), **reader)
    for first in range(0, 60, 6):
        torch.testing.assert_close(sums(table, first), values[first : first + 6].sum(0))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EINTR])
def test_transient_read_errors_are_retried(file, values, reader, error):
    # every second read fails: more failures in a row than the retries of a short read
    table = table_of(file, fault=ReadFault(2, -error), **reader)
    for first in range(0, 60, 6):
        torch.testing.assert_close(sums(table, first), values[first : first + 6].sum(0))


@pytest.mark.parametrize(
    ("error", "retry_ms"), [(errno.ENOMEM, 20), (errno.EAGAIN, 0), (errno.EIO, 10_000)]
)
def test_after_the_last_retry_a_lookup_fails_and_the_next_one_starts_afresh(
    file, values, error, retry_ms
):
    fault = ReadFault(submits=9, submit_error=error, retry_ms=retry_ms)
    table, failed = table_of(file, fault=fault), 0
    for _ in range(10):
        try:
            torch.testing.assert_close(sums(table, 0), values[:6].sum(0))
        except TableReadError as raised:
            failed += 1
            assert os.strerror(error) in str(raised)
    assert 0 < failed < 10
    assert table.fault is None
    torch.testing.assert_close(sums(table, 6), values[6:12].sum(0))


def test_waiting_rows_fail_together_and_are_read_by_the_next_lookup(tmp_path):
    values = torch.randn(4000, WIDTH)
    (tmp_path / "table").write_bytes(values.numpy().tobytes())
    cache_bytes = row_cache_bytes(4000, WIDTH * 4, 4000)
    fault = ReadFault(submits=4, submit_error=errno.ENOMEM, retry_ms=1)
    table = DiskTable(tmp_path / "table", 0, (4000, WIDTH), torch.float32, cache_bytes, fault=fault)
    rows = torch.randperm(4000).view(40, 10, 10)
    failed = 0
    while True:
        try:
            found = table.start(rows, torch.ones(rows.shape)).finish()
            break
        except TableReadError as raised:
            assert "Cannot allocate memory" in str(raised)
            failed += 1
    assert 0 < failed <= 4
    torch.testing.assert_close(found, values[rows].sum((1, 2)))


def test_endless_transient_errors_fail_the_lookup(file):
    table = table_of(file, fault=ReadFault(1, -errno.EAGAIN, retry_ms=20))
    for first in (0, 6):
        with pytest.raises(TableReadError, match="Resource temporarily unavailable"):
            sums(table, first)
    # the machine is at fault, not the table
    assert table.fault is None


def test_watchers_are_called_while_a_submit_is_retried(file):
    # pauses of 1 to 64 ms, then 100 ms: together more than the 0.5 s between calls of watchers
    table, bytes_read_at_calls = (
        table_of(file, fault=ReadFault(submits=13, submit_error=errno.ENOMEM)),
        [],
    )
    table.watch(lambda: bytes_read_at_calls.append(table.statistics()[0].bytes_read))
    sums(table, 0)
    assert bytes_read_at_calls[0] == 0 and bytes_read_at_calls[-1] > 0


def test_watchers_are_called_while_a_lookup_waits_for_slots(file, values):
    # prefetches that cannot be read yet have all slots
    fault = ReadFault(submits=20, submit_error=errno.ENOMEM)
    table, misses_at_calls = table_of(file, slots=16, fault=fault), []
    table.watch(lambda: misses_at_calls.append(table.statistics()[0].misses))
    table.hint(torch.arange(100, 150).view(1, 1, 50))
    assert table.statistics()[0].prefetched >= 12
    torch.testing.assert_close(sums(table, 0, 16), values[:16].sum(0))
    assert misses_at_calls[0] < 16 == misses_at_calls[-1]


@pytest.mark.parametrize("reader", READERS)
def test_a_table_with_no_readable_row_is_lost(file, reader):
    table = table_of(file, fault=ReadFault(1, -errno.EIO), **reader)
    # a repeated failure of the same row counts once
    for _ in range(20):
        with pytest.raises(TableReadError, match="row 0: Input/output error"):
            sums(table, 0, 1)
    assert table.fault is None
    for row in range(1, 7):
        with pytest.raises(TableReadError):
            sums(table, row, 1)
        assert table.fault is None
    with pytest.raises(TableReadError):
        sums(table, 7, 1)
    assert table.fault == f"{file}: no row can be read: Input/output error"


def test_one_successful_read_ends_the_loss(file, values):
    # the first eight submits fail, one row each; all later ones succeed
    table = table_of(file, fault=ReadFault(submits=8, submit_error=errno.ENODEV))
    for row in range(8):
        assert table.fault is None
        with pytest.raises(TableReadError, match="No such device"):
            sums(table, row, 1)
    assert table.fault == f"{file}: no row can be read: No such device"
    torch.testing.assert_close(sums(table, 0), values[:6].sum(0))
    assert table.fault is None


def test_a_read_past_the_end_of_a_truncated_file_marks_the_table_as_lost(tmp_path, file):
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    table = table_of(copy, fault=ReadFault(1, 8))
    rows = torch.arange(6).view(1, 1, 6)
    lookup = table.start(rows, torch.ones(rows.shape))
    os.truncate(copy, 0)
    with pytest.raises(TableReadError, match="row 0: the file ends before this row"):
        lookup.finish()
    assert table.fault == f"{copy}: the file changed after it was opened: reload the table"
