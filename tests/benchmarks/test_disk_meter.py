"""Limits of the disk that has a model's tables."""

import pytest

from benchmarks import disk_meter
from benchmarks.disk_meter import limits_of_tables
from memory_ops.native import disk_rows
from server.plan.machine import DiskLimits
from tests.models import feed_forward_changes, random_model, save_model, tiny_config


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_tables_are_measured_where_they_are(tmp_path, monkeypatch):
    folder = save_model(
        random_model(tiny_config(**feed_forward_changes("memory_plus", "dense"))), tmp_path / "m"
    )
    seen = []

    def measured(location, depth, count, seed):
        seen.append((location.num_rows, location.row_bytes, depth))
        return 1000.0 * depth

    monkeypatch.setattr(disk_meter, "random_reads_per_s", measured)
    found = limits_of_tables(folder)
    if found is None:  # a filesystem without direct reads
        assert not seen
        return
    assert found == DiskLimits(256_000.0, 1e-3)
    assert seen == [(64, 128, depth) for depth in (1, 64, 128, 256)]


def test_what_has_no_tables_is_not_measured(tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    assert limits_of_tables(folder) is None
    assert limits_of_tables(folder / "config.json") is None
