"""Table files: alignment, fallbacks of direct reads, and comparison of touched files."""

import errno
import hashlib
import os
from contextlib import closing

import pytest
import torch

from memory_ops.native import disk_rows
from memory_ops.tables import table_file
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from memory_ops.tables.table_file import TableFile
from memory_ops.tables.value_table import TableReadError

ROWS, WIDTH, OFFSET = 3000, 24, 4096
needs_native = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")


@pytest.fixture
def values():
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH)


@pytest.fixture
def file(tmp_path, values):
    file = tmp_path / "table"
    file.write_bytes(b"x" * OFFSET + values.numpy().tobytes())
    return file


def opened(file, checksum=None, **options):
    return TableFile(file, OFFSET, ROWS * WIDTH * 4, checksum=checksum, **options)


def checksum_of(file):
    return hashlib.sha256(file.read_bytes()[OFFSET:]).hexdigest()


def needs_alignment(monkeypatch, alignment, error=errno.EINVAL):
    """Make reads fail whose offset or size is not a multiple of ``alignment``."""
    real = os.preadv

    def preadv(descriptor, buffers, offset):
        if sum(len(buffer) for buffer in buffers) % alignment or offset % alignment:
            raise OSError(error, os.strerror(error))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(table_file.os, "preadv", preadv)


@needs_native
@pytest.mark.parametrize("alignment", [512, 16384, 65536])
def test_rows_are_read_with_the_alignment_that_the_file_needs(
    file, values, monkeypatch, caplog, alignment
):
    needs_alignment(monkeypatch, alignment)
    cache_bytes = row_cache_bytes(500, WIDTH * 4, ROWS)
    table = DiskTable(file, OFFSET, (ROWS, WIDTH), torch.float32, cache_bytes)
    assert table.location.alignment >= alignment and table.location.alignment % alignment == 0
    rows = torch.randperm(ROWS).view(100, 3, 10)
    found = table.start(rows, torch.ones(rows.shape)).finish()
    torch.testing.assert_close(found, values[rows].sum((1, 2)))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errno.EINVAL, "Invalid argument, for all sizes up to 65536 bytes"),
        (errno.EOPNOTSUPP, "Operation not supported"),
    ],
)
def test_without_direct_reads_the_page_cache_is_used_and_one_log_line_says_so(
    file, monkeypatch, caplog, error, reason
):
    with monkeypatch.context() as patch:
        needs_alignment(patch, 2**30, error)
        descriptor, alignment = table_file._open(file, is_direct=True)
    os.close(descriptor)
    assert alignment == 1
    assert caplog.messages == [
        f"{file}: direct reads fail ({reason}): reads use the page cache instead"
    ]


@needs_native
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_without_o_direct_the_page_cache_is_used(file, values, monkeypatch, caplog, error):
    real = os.open

    def refuse(path, flags, *others):
        if flags & os.O_DIRECT:
            raise OSError(error, os.strerror(error))
        return real(path, flags, *others)

    monkeypatch.setattr(table_file.os, "open", refuse)
    cache_bytes = row_cache_bytes(500, WIDTH * 4, ROWS)
    table = DiskTable(file, OFFSET, (ROWS, WIDTH), torch.float32, cache_bytes)
    rows = torch.randperm(ROWS).view(100, 3, 10)
    found = table.start(rows, torch.ones(rows.shape)).finish()
    torch.testing.assert_close(found, values[rows].sum((1, 2)))
    (message,) = caplog.messages
    assert message.startswith(f"{file}: ") and os.strerror(error) in message


def test_other_errors_refuse_the_file(file, monkeypatch):
    needs_alignment(monkeypatch, 2**30, errno.EIO)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TableReadError, match="Input/output error"):
        opened(file)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(params=["checksum", "sample", "large"])
def compared(request, file, monkeypatch):
    """A table file with a checksum, without one, and without one but larger than the sample."""
    if request.param == "large":
        monkeypatch.setattr(table_file, "_SAMPLES", 20)
        monkeypatch.setattr(table_file, "_SAMPLE_BYTES", 1000)
    with closing(opened(file, checksum_of(file) if request.param == "checksum" else None)) as table:
        yield table


@pytest.mark.parametrize(
    "touch",
    [
        lambda file: os.utime(file, ns=(0, 0)),
        lambda file: file.write_bytes(file.read_bytes()),
        lambda file: file.write_bytes(file.read_bytes() + b"more"),
    ],
)
def test_a_touched_file_stays_in_use(compared, caplog, touch):
    calls = []
    compared.check(lambda: calls.append(1))
    assert not calls
    touch(compared.file)
    compared.check(lambda: calls.append(1))
    assert calls and compared.fault is None
    # compared once per change, not once per lookup
    count = len(calls)
    compared.check(lambda: calls.append(1))
    assert len(calls) == count and len(caplog.messages) == 1
    assert str(compared.file) in caplog.messages[0]


def rewrite(file):
    file.write_bytes(b"x" * OFFSET + torch.randn(ROWS, WIDTH).numpy().tobytes())


@pytest.mark.parametrize("change", [rewrite, lambda file: os.truncate(file, OFFSET + 1000)])
def test_changed_contents_make_the_table_unusable_for_good(compared, change):
    before = compared.file.read_bytes()
    change(compared.file)
    os.utime(compared.file, ns=(0, 0))
    for _ in range(2):
        with pytest.raises(TableReadError, match="table: the file changed after it was opened"):
            compared.check(lambda: None)
        assert "the file changed after it was opened" in compared.fault
        # rows of the time between may be in memory
        compared.file.write_bytes(before)


def test_a_checksum_finds_one_changed_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with closing(opened(file, checksum_of(file))) as table:
        file.write_bytes(content)
        os.utime(file, ns=(0, 0))
        with pytest.raises(TableReadError, match="the file changed after it was opened"):
            table.check(lambda: None)


def test_a_failed_stat_is_a_fault_until_stat_succeeds(file, monkeypatch):
    def stale(descriptor):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with closing(opened(file)) as table:
        with monkeypatch.context() as patch:
            patch.setattr(table_file.os, "fstat", stale)
            with pytest.raises(TableReadError, match="table: Stale file handle"):
                table.check(lambda: None)
            assert table.fault == f"{file}: Stale file handle"
        table.check(lambda: None)
        assert table.fault is None
