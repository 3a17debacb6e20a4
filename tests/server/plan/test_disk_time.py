"""Time of steps that read table rows from disk, against sums by hand."""

import pytest

from server.plan.disk_time import _READ_WORK, cpu_micro_batches, seconds_from_disk
from server.plan.machine import DiskLimits
from tests.models import feed_forward_changes, tiny_config

# two memory layers of 2 heads x 3 rows, of which the second reads two tables: 18 rows a token
CONFIG = tiny_config(**feed_forward_changes("memory_plus", "peer", num_subkeys=64))
PLAIN = tiny_config(**feed_forward_changes("memory_plus", "pkm", num_subkeys=64))
DISK = DiskLimits(reads_per_s=1000, latency_s=0.5)


def seconds(reads, micro_batches=1, is_on_gpu=False, config=PLAIN):
    return seconds_from_disk(
        config, DISK, 10.0, reads, micro_batches=micro_batches, is_on_gpu=is_on_gpu
    )


def test_each_layer_waits_for_its_reads():
    assert seconds(0) == 10
    assert seconds(100, is_on_gpu=True) == pytest.approx(10 + 2 * 0.5 + 0.1)
    assert seconds(100) == pytest.approx(10 + 2 * 0.5 + 0.1 + 100 * _READ_WORK)
    # fewer reads than layers
    assert seconds(1, is_on_gpu=True) == pytest.approx(10 + 0.5 + 0.001)


def test_a_peer_layer_reads_both_tables_at_once():
    assert seconds(100, config=CONFIG) == seconds(100)


def test_reads_of_micro_batches_overlap_with_layers():
    reading, working = 1.0 + 0.1, 10 + 100 * _READ_WORK
    assert seconds(100, 2) == pytest.approx(working + reading / 2)
    assert seconds(1000, 4) == pytest.approx(10 + 1000 * _READ_WORK + 2.0 / 4)
    long = 1.0 + 20.0
    assert seconds(20_000, 4) == pytest.approx(long + (10 + 20_000 * _READ_WORK) / 4)


def test_reads_of_peer_layers_do_not_overlap():
    # two of three lookups
    reading, working = 1.0 + 0.3, 10 + 300 * _READ_WORK
    expected = reading * 2 / 3 + working + reading / 3 / 2
    assert seconds(300, 2, config=CONFIG) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "reads", "cached_rows", "count"),
    [
        (31, 100, 4096, 1),
        (32, 58, 4096, 2),  # a tenth of 576 rows
        (32, 57, 4096, 1),
        (32, 100, 191, 1),  # a lookup reads 192
        (32, 100, 192, 2),
        (256, 1000, 4096, 4),
        (256, 1000, 0, 1),
    ],
)
def test_a_step_is_split_by_the_rule_of_the_engine(tokens, reads, cached_rows, count):
    assert cpu_micro_batches(CONFIG, tokens, reads, cached_rows) == count
