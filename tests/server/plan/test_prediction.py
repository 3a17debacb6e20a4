"""Tokens a second of tiers, against figures computed by hand, and what fits."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.plan.machine import GPUS, gpu_machine
from server.plan.options import PlanOptions
from server.plan.planned_model import planned_model
from server.plan.prediction import plans

MEMORY_8B = Path(__file__).parents[3] / "docs" / "plans" / "memory-8b.json"
GIB = 2**30
# steps that attend to 512 tokens, at the bandwidth itself
OPTIONS = PlanOptions(
    gpu="h100",
    host_memory="256GiB",
    context_len=1024,
    batches=(1, 8, 32, 64),
    efficiency=1.0,
    hit_share=0.0,
    disk_reads=1e6,
    disk_latency_us=200,
)


def planned(options: PlanOptions, gpus: int = 1, host_memory: int = 256 * GIB):
    model = planned_model(MEMORY_8B, options, is_on_gpu=True)
    machine = gpu_machine("h100", GPUS["h100"], gpus, host_memory, options.disk(None))
    return {one.tier: one for one in plans(model, machine, options)}


@pytest.mark.parametrize(
    ("tier", "hit_share", "tokens_per_s"),
    [
        ("device", 0.0, (205, 1590, 5747, 10_185)),
        ("host", 0.0, (203, 1456, 4316, 6414)),
        ("host", 0.77, (205, 1557, 5340, 8972)),
    ],
)
def test_bounds_of_8b_with_a_memory_are_those_computed_by_hand(tier, hit_share, tokens_per_s):
    found = planned(replace(OPTIONS, hit_share=hit_share))[tier]
    assert found.decode_tokens_per_s == pytest.approx(tokens_per_s, rel=0.02)


def test_the_disk_adds_the_time_of_its_reads():
    found = planned(OPTIONS)
    seconds = [1 / found[tier].decode_tokens_per_s[0] for tier in ("host", "disk")]
    assert seconds[1] - seconds[0] == pytest.approx(3 * 2e-4 + 3 * 128 / 1e6)
    # rows of the cache in host memory come over the bus too
    cached = planned(replace(OPTIONS, hit_share=1.0))
    assert cached["disk"].decode_tokens_per_s == found["host"].decode_tokens_per_s
    half = planned(replace(OPTIONS, efficiency=0.5))
    whole = found["device"].decode_tokens_per_s[0]
    assert half["device"].decode_tokens_per_s[0] == pytest.approx(whole / 2)


def test_each_tier_needs_its_part_of_the_table():
    table, cache = 128 * GIB, round(12.8 * GIB)
    found = planned(OPTIONS)
    dense = found["device"].device_bytes - table
    assert found["host"].device_bytes == dense + cache and found["host"].host_bytes == table
    assert found["disk"].device_bytes == dense + 2 * GIB and found["disk"].host_bytes == cache
    assert [one.fits for one in found.values()] == [False, True, True]
    assert [one.fits for one in planned(OPTIONS, gpus=8).values()] == [True, True, True]
    assert [one.fits for one in planned(OPTIONS, 1, 100 * GIB).values()] == [False, False, True]
    assert [one.fits for one in planned(OPTIONS, 1, 8 * GIB).values()] == [False, False, False]
