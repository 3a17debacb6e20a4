"""Tokens a second of tiers, against figures computed by hand, and what fits."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.model.machine_limits import MachineLimits
from server.plan.machine import GPUS, DiskLimits, Gpu, Link, Machine, gpu_machine
from server.plan.options import PlanOptions
from server.plan.planned_model import planned_model
from server.plan.prediction import plans
from tests.models import feed_forward_changes, random_model, save_model, tiny_config

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


def planned(options: PlanOptions, host_memory: int = 256 * GIB):
    model = planned_model(MEMORY_8B, options, is_on_gpu=True)
    ranks, disk = options.tensor_parallel, options.disk(None)
    link = options.link(450) if ranks > 1 else None
    machine = gpu_machine("h100", GPUS["h100"], ranks, host_memory, disk, link)
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
    assert [one.fits for one in planned(OPTIONS, 100 * GIB).values()] == [False, False, True]
    assert [one.fits for one in planned(OPTIONS, 8 * GIB).values()] == [False, False, False]


@pytest.fixture
def small(tmp_path):
    """A config.json of two layers, 32 wide, the first one with a memory of 64 rows, untied."""
    config = tiny_config(**feed_forward_changes("memory_plus", "dense"))
    return save_model(random_model(config), tmp_path / "model") / "config.json"


# test_planned_model.py has this sum; without embedding and head, in bf16
LAYERS, HEAD = 2 * (30_320 - 2 * 260 * 32), 2 * 260 * 32


def test_a_small_model_on_a_slow_gpu_by_hand(small):
    options = PlanOptions(
        gpu="h100",
        host_memory="1GiB",
        context_len=64,
        batches=(1, 2),
        prompt_len=4,
        efficiency=1.0,
        hit_share=0.25,
    )
    model = planned_model(small, options, is_on_gpu=True)
    # 1 byte in a nanosecond, half as fast over the bus; products take no time
    gpu, disk = Gpu(100_000, 1, 1e9, 0.5, 1), DiskLimits(reads_per_s=1e6, latency_s=1e-4)
    machine = gpu_machine("slow", gpu, 1, 2**30, disk)
    device, host, on_disk = plans(model, machine, options)
    # a sequence reads 6 rows of 64 bytes, and keys and values of 33 tokens, 128 bytes each
    one, two = (LAYERS + HEAD + n * (6 * 64 + 33 * 128) for n in (1, 2))
    assert one == 27_360 + 16_640 + 384 + 4224
    assert device.decode_tokens_per_s == pytest.approx((1e9 / one, 2e9 / two))
    # a prompt of 4 reads 24 rows, and the head once
    prompt = LAYERS + HEAD + 24 * 64 + 4 * 128
    assert device.prefill_tokens_per_s == pytest.approx(4e9 / prompt)
    # three quarters of the rows come over the bus
    assert host.decode_tokens_per_s[1] == pytest.approx(2e9 / (two + 12 * 48 / 0.5))
    # all rows come over the bus; 4.5 of 6 are read, all in one lookup
    nanoseconds = one + 384 / 0.5 + 100_000 + 4500
    assert on_disk.decode_tokens_per_s[0] == pytest.approx(1e9 / nanoseconds)
    # 60,640 bytes of weights, 2 sequences of 64 tokens, a table of 4,096 bytes or a tenth of it
    assert device.device_bytes == 60_640 + 2 * 64 * 128 + 4096 and device.fits
    assert (host.device_bytes, host.host_bytes) == (60_640 + 16_384 + 410, 4096)
    assert (on_disk.device_bytes, on_disk.host_bytes) == (60_640 + 16_384 + 4096, 410)


def test_micro_batches_of_a_cpu_read_the_weights_again(tmp_path):
    config = tiny_config(**feed_forward_changes("memory_plus", "dense", num_subkeys=64))
    file = save_model(random_model(config), tmp_path / "model") / "config.json"
    options = PlanOptions(
        context_len=64,
        batches=(1,),
        prompt_len=256,
        efficiency=1.0,
        cache_share=0.5,
        hit_share=0.0,
        disk_reads=1e15,
        disk_latency_us=1e-9,
    )
    # products take no time, and reads none but the CPU's work
    machine = Machine("one", 2**30, MachineLimits(1, 1e9, 1e9), options.disk(None), threads=1)
    found = plans(planned_model(file, options, is_on_gpu=False), machine, options)
    device, on_disk = (256 / one.prefill_tokens_per_s for one in found)
    # 2 heads, 2 halves and 56 more subkeys of 4 numbers, in bf16; 1,536 rows of 3.3 µs
    again = LAYERS + 2 * 2 * 2 * 56 * 4
    assert on_disk - device == pytest.approx(1536 * 3.3e-6 + 3 * again / 1e9)


def test_two_ranks_of_a_small_model_by_hand(small):
    options = PlanOptions(
        gpu="h100", tensor_parallel=2, context_len=64, batches=(1,), prompt_len=4, efficiency=1.0
    )
    model = planned_model(small, options, is_on_gpu=True)
    gpu = Gpu(100_000, 1, 1e9, 0.5, 1)
    machine = gpu_machine("slow", gpu, 2, 0, options.disk(None), Link(2, 1e-3))
    (device,) = plans(model, machine, options)
    # test_rank_parts.py has this sum: whole norms, embedding, head, queries and subkeys
    numbers = 2 * 1536 + 2304 + 1728 + 160 + 2 * 8320
    assert device.device_bytes == 2 * numbers + 64 * 64 + 2048
    read = 2 * (numbers - 2 * 8320) + 8320 + 6 * 32 + 33 * 64
    # a sum behind each attention and feed-forward: half is sent, twice; half of the logits, in
    # fp32; the last tokens of 64 sequences
    sent = 4 * 64 + 520 + 512
    nanoseconds = read + 6e6 + sent / 2
    assert device.decode_tokens_per_s[0] == pytest.approx(1e9 / nanoseconds)


def test_ranks_on_a_cpu_have_their_part_of_its_limits(small):
    shared = {"context_len": 64, "batches": (1,), "prompt_len": 4}
    alone, together = PlanOptions(**shared), PlanOptions(**shared, tensor_parallel=2)
    limits, disk = MachineLimits(1, 1e9, 1e9), alone.disk(None)
    made = [Machine("one", 2**30, limits, disk, threads=4)]
    made.append(Machine("two", 2**30, limits, disk, 2, Link(1e9, 1e-9), threads=4))
    assert made[1].rank_limits == MachineLimits(0.5, 5e8, 5e8) and made[1].rank_threads == 2
    models = [planned_model(small, one, is_on_gpu=False) for one in (alone, together)]
    found = [plans(*both) for both in zip(models, made, (alone, together), strict=True)]
    assert [[one.tier for one in tiers] for tiers in found] == [["device", "disk"], ["device"]]
    # ranks read whole norms, queries and subkeys, and do whole scoring, with half of the machine
    speeds = [tiers[0].decode_tokens_per_s[0] for tiers in found]
    assert 0.5 * speeds[0] < speeds[1] < speeds[0]
    # whole weights but embedding and head are there twice
    whole = 2 * (160 + 528 + 128 + 32)
    assert found[1][0].device_bytes - found[0][0].device_bytes == whole


def test_eight_h100s_hold_the_8b_model_in_their_memory():
    options = replace(OPTIONS, tensor_parallel=8, host_memory=None, batches=(1, 64))
    (device,) = planned(options, host_memory=0).values()
    width, inner, vocabulary = 4096, 14_336, 128_256
    attention = 32 * (2 * width * 512 + 2 * width * 128)
    dense = 29 * 3 * width * inner // 8
    queries = 8192 * (width + 1) + 4 * 2 * 4096 * 1024 + 2048
    memory = 3 * (queries + 512 * (width + 1) + width * (512 + 1))
    layers = attention + dense + memory + 65 * width
    # embedding and head are whole; the table has 2^24 rows of 512 columns, a token one KV head
    table, kv = 2**24 * 512 * 2, 2 * 32 * 128 * 2
    assert device.device_bytes == 2 * (layers + 2 * vocabulary * width) + table + 65_536 * kv
    assert device.fits
    for batch, found in zip((1, 64), device.decode_tokens_per_s, strict=True):
        rows = 3 * batch * 128 * 1024
        read = 2 * (layers + vocabulary // 8 * width) + rows + batch * 513 * kv
        sums, logits = 64 * 2 * batch * width * 2, batch * vocabulary * 4
        # one exchange gives the ranks the last tokens of 64 sequences
        seconds = read / 3e12 + 66 * 20e-6 + ((sums + logits) * 7 / 8 + 512) / 450e9
        assert found == pytest.approx(batch / seconds)


def test_replicas_have_the_speed_and_the_memory_of_all():
    options = replace(OPTIONS, tensor_parallel=8, host_memory=None, replicas=3)
    one = planned(options, host_memory=0)["device"]
    machine = gpu_machine("h100", GPUS["h100"], 8, 0, options.disk(None), options.link(450))
    all_of_them = one.of_replicas(3, machine)
    assert all_of_them.device_bytes == 3 * 8 * one.device_bytes
    assert all_of_them.decode_tokens_per_s == tuple(3 * speed for speed in one.decode_tokens_per_s)
    assert all_of_them.prefill_tokens_per_s == 3 * one.prefill_tokens_per_s
    host = planned(OPTIONS)["host"]
    assert host.of_replicas(2, replace(machine, ranks=1)).host_bytes == 256 * GIB
    on_cpu = replace(machine, device_memory=None, threads=8)
    assert one.of_replicas(3, on_cpu).device_bytes == 3 * one.device_bytes
