"""The time of a step: shares of the limits, and what a CPU adds for each sequence."""

import pytest

from engine.model.machine_limits import MachineLimits
from engine.model.step_work import Chunk, ModelWork
from server.plan.step_time import step_seconds
from tests.models import tiny_config

LIMITS = MachineLimits(gb_per_s=1, gflops=1)
WORK = ModelWork(tiny_config(num_layers=3), 2, 0)


def seconds(sequences, efficiency=1.0, threads=0):
    chunks = [Chunk(9, 1)] * sequences
    return step_seconds(WORK, LIMITS, chunks, sequences, efficiency=efficiency, threads=threads)


def test_a_step_takes_its_least_time_by_the_efficiency():
    least = WORK.seconds_in_turn([Chunk(9, 1)] * 4, 4, LIMITS)
    assert seconds(4) == least and seconds(4, efficiency=0.5) == 2 * least


def test_a_cpu_adds_time_for_each_sequence_which_threads_share_in_layers():
    def added(sequences, threads):
        return seconds(sequences, threads=threads) - seconds(sequences)

    assert added(1, 2) > 0
    one, two = added(5, 1) - added(4, 1), added(5, 2) - added(4, 2)
    assert two < one < 2 * two
    assert added(9, 2) - added(8, 2) == pytest.approx(two)
