"""Time of a step in memory: shares of the limits, and what a CPU adds."""

import pytest

from engine.model.machine_limits import MachineLimits
from engine.model.step_work import Chunk, ModelWork
from server.plan.cpu_time import cpu_seconds
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


def test_a_cpu_adds_its_own_time():
    chunks = [Chunk(9, 1)] * 4
    added = cpu_seconds(WORK.config, WORK.kv_bytes, chunks, 2)
    assert seconds(4, threads=2) == pytest.approx(seconds(4) + added)
