"""Time of a step in memory: shares of the limits, and what a CPU adds."""

import pytest

from engine.executors.parallel.shares import RankShare
from engine.model.machine_limits import MachineLimits
from engine.model.step_work import Chunk, ModelWork
from server.plan.cpu_time import CpuCosts, cpu_seconds
from server.plan.step_time import step_seconds
from tests.models import feed_forward_changes, tiny_config

LIMITS = MachineLimits(gb_per_s=1, gflops=1)
WORK = ModelWork(tiny_config(num_layers=3), 2, 0)


def seconds(sequences, efficiency=1.0, threads=0, work=WORK, micro_batches=1, limits=LIMITS):
    return step_seconds(
        work,
        limits,
        [Chunk(9, 1)] * sequences,
        sequences,
        efficiency=efficiency,
        threads=threads,
        micro_batches=micro_batches,
    )


def test_a_step_takes_its_least_time_by_the_efficiency():
    least = WORK.seconds_in_turn([Chunk(9, 1)] * 4, 4, LIMITS)
    assert seconds(4) == least and seconds(4, efficiency=0.5) == 2 * least


def test_a_cpu_adds_its_own_time():
    chunks = [Chunk(9, 1)] * 4
    added = cpu_seconds(WORK.config, WORK.row_bytes, chunks, 2)
    assert seconds(4, threads=2) == pytest.approx(seconds(4) + added)


def test_micro_batches_read_the_weights_again():
    # without the head, 260 x 32; products take no time
    layers = WORK.products(4, 0).num_bytes
    assert layers == WORK.products(4, 4).num_bytes - 2 * 260 * 32
    reading = MachineLimits(gb_per_s=1, gflops=1e9)
    again = seconds(4, 0.5, micro_batches=2, limits=reading) - seconds(4, 0.5, limits=reading)
    assert again == pytest.approx(2 * layers / 1e9)


def test_a_rank_s_rows_cost_as_much_as_the_columns_that_it_reads():
    config = tiny_config(**feed_forward_changes("memory_plus", "dense"))
    ranks = [RankShare(config, 0, 2, sharding) for sharding in ("columns", "rows")]
    works = [ModelWork(config, 2, 1, share=share) for share in ranks]
    values = 4 * 6 * CpuCosts().row_value  # of 4 tokens with 6 rows each
    with_rows, none = (
        [seconds(4, threads=threads, work=work) for work in works] for threads in (1, 0)
    )
    added = [first - second for first, second in zip(with_rows, none, strict=True)]
    assert added[1] - added[0] == pytest.approx(16 * values)
