"""Limits of the disk that has a model's tables."""

import errno

import pytest

from benchmarks import disk_meter
from benchmarks.disk_meter import limits_of_tables
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import RingError
from server.plan.machine import DiskLimits
from tests.models import feed_forward_changes, random_model, save_model, tiny_config


@pytest.fixture
def folder(tmp_path):
    changes = feed_forward_changes("memory_plus", "dense")
    return save_model(random_model(tiny_config(**changes)), tmp_path / "memory")


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_tables_are_measured_where_they_are(folder, monkeypatch):
    seen = []

    def measured(location, depth, count, seed):
        seen.append((location.num_rows, location.row_bytes, depth))
        return 1000.0 * depth

    monkeypatch.setattr(disk_meter, "random_reads_per_s", measured)
    found = limits_of_tables(folder)
    if found is None:  # a filesystem without direct reads
        assert not seen
        return
    assert found == DiskLimits(256_000.0, 1e-3, "measured")
    assert seen == [(64, 128, depth) for depth in (1, 64, 64, 128, 256)]


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
