"""Time of steps that read table rows from disk, against sums by hand."""

import pytest

from server.plan.disk_time import _READ_WORK, seconds_from_disk
from server.plan.machine import DiskLimits
from tests.models import feed_forward_changes, tiny_config

# two memory layers of 2 heads x 3 rows, of which the second reads two tables: 18 rows a token
CONFIG = tiny_config(**feed_forward_changes("memory_plus", "peer", num_subkeys=64))
DISK = DiskLimits(reads_per_s=1000, latency_s=0.5)


def seconds(tokens, reads, cached_rows=4096, is_on_gpu=False):
    return seconds_from_disk(
        CONFIG, DISK, 10.0, tokens, reads, cached_rows=cached_rows, is_on_gpu=is_on_gpu
    )


def test_each_lookup_waits_for_its_reads():
    assert seconds(8, 0) == 10
    assert seconds(8, 100, is_on_gpu=True) == pytest.approx(10 + 3 * 0.5 + 0.1)
    assert seconds(8, 100) == pytest.approx(10 + 3 * 0.5 + 0.1 + 100 * _READ_WORK)
    # fewer reads than lookups
    assert seconds(8, 1, is_on_gpu=True) == pytest.approx(10 + 0.5 + 0.001)


def test_reads_of_micro_batches_overlap_with_layers():
    reading, working = 1.5 + 0.1, 10 + 100 * _READ_WORK
    assert seconds(32, 100) == pytest.approx(working + reading / 2)
    assert seconds(256, 1000) == pytest.approx(10 + 1000 * _READ_WORK + 2.5 / 4)
    long = 1.5 + 20.0
    assert seconds(2000, 20_000) == pytest.approx(long + (10 + 20_000 * _READ_WORK) / 4)


@pytest.mark.parametrize(
    "step",
    [
        {"tokens": 31, "reads": 100},
        {"tokens": 32, "reads": 57},  # a tenth of 576 rows is more
        {"tokens": 32, "reads": 100, "cached_rows": 191},  # a lookup reads 192
        {"tokens": 32, "reads": 100, "is_on_gpu": True},
    ],
)
def test_a_step_is_not_split(step):
    working = 10.0 if step.get("is_on_gpu") else 10 + step["reads"] * _READ_WORK
    assert seconds(**step) == pytest.approx(working + 1.5 + step["reads"] / 1000)
