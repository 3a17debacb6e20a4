"""Limits of the disk that has a model's tables."""

import errno

import pytest

from benchmarks import disk_meter
from benchmarks.disk_meter import limits_of_tables
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import RingError
from memory_ops.tables.table_file import TableFile
from server.plan.machine import DiskLimits
from tests.models import feed_forward_changes, random_model, save_model, tiny_config


@pytest.fixture
def folder(tmp_path):
    changes = feed_forward_changes("memory_plus", "dense")
    return save_model(random_model(tiny_config(**changes)), tmp_path / "memory")


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
@pytest.mark.parametrize("alignment", [512, 1])
def test_tables_are_measured_where_they_are_unless_reads_are_buffered(
    folder, monkeypatch, alignment
):
    class AlignedFile(TableFile):
        """A table's file on a filesystem that aligns reads so; 1 has no direct reads."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.alignment = alignment

    seen = []

    def measured(location, depth, count, seed):
        seen.append((location.num_rows, location.row_bytes, location.alignment, depth))
        return 1000.0 * depth

    monkeypatch.setattr(disk_meter, "TableFile", AlignedFile)
    monkeypatch.setattr(disk_meter, "random_reads_per_s", measured)
    found = limits_of_tables(folder)
    if alignment == 1:
        assert found is None and not seen
    else:
        assert found == DiskLimits(256_000.0, 1e-3, "measured")
        assert seen == [(64, 128, 512, depth) for depth in (1, 64, 64, 128, 256)]


def test_without_io_uring_nothing_is_measured(folder, monkeypatch):
    asked = []

    def refused(*arguments):
        asked.append(arguments)
        raise RingError(errno.EPERM, "forbidden")

    monkeypatch.setattr(disk_meter, "random_reads_per_s", refused)
    assert limits_of_tables(folder) is None and len(asked) <= 1


def test_what_has_no_tables_is_not_measured(tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    assert limits_of_tables(folder) is None
    assert limits_of_tables(folder / "config.json") is None
