"""The choice of the table tier on a GPU, for given amounts of GPU and host memory."""

import logging
from dataclasses import replace

import pytest
import torch

from engine.errors import ConfigError
from weights.available_memory import AvailableMemory
from weights.checkpoints.gpu_tier import GpuTierChoice, naming_lack_of_memory
from weights.checkpoints.host_cache_limits import HostCacheLimits
from weights.checkpoints.memory_request import MemoryRequest, MemoryShares

MIB, GIB = 2**20, 2**30
GPU = torch.device("cuda", 0)
TOTAL = 40 * GIB
BUDGET = 36 * GIB  # the default fraction is 0.9
LIMITS = HostCacheLimits(64 * MIB, 64 * GIB)


def choice_of(
    tier: str = "auto",
    *,
    free: int = TOTAL,
    host: int = 64 * GIB,
    cache: int | None = None,
    kv: int = 2 * GIB,
    is_kv_requested: bool = False,
    limits: HostCacheLimits = LIMITS,
    patches: int = 0,
) -> GpuTierChoice:
    request = MemoryRequest(kv, cache, 2 * GIB, tier, is_kv_requested, patch_bytes=patches)

    def read_gpu(device: torch.device) -> tuple[int, int]:
        assert device == GPU
        return free, TOTAL

    return GpuTierChoice(
        request, GPU, 0.9, limits, read_gpu, lambda: AvailableMemory(host, "a test")
    )


def test_auto_takes_the_gpu_if_tables_fit_with_weights_kv_and_a_step(caplog):
    caplog.set_level(logging.INFO)
    # 3 GiB are kept for the KV pool and a step
    assert choice_of().shares(BUDGET - 8 * GIB, 5 * GIB) == MemoryShares(None, None)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "tables of 28.00 GiB are loaded into the GPU's memory (device tier): 36.00 GiB is available"
        " (0.9 of cuda:0, --gpu-memory-utilization), less 5.00 GiB for weights, 2.00 GiB for the KV"
        " pool and 1.00 GiB for a step"
    )


def test_memory_of_row_patches_is_reserved(caplog):
    caplog.set_level(logging.INFO)
    choice = choice_of(patches=GIB)
    assert choice.shares(BUDGET - 9 * GIB, 5 * GIB).cache_bytes is None
    assert caplog.messages[0].endswith("and 2.00 GiB for a step and row patches")
    assert choice.shares(BUDGET - 9 * GIB + 1, 5 * GIB).cache_bytes == 2 * GIB


@pytest.mark.parametrize(("tier", "count"), [("auto", 1), ("host", 1), ("disk", 1), ("device", 0)])
def test_host_memory_is_read_once(tier, count):
    reads: list[str] = []

    def read() -> AvailableMemory:
        reads.append(tier)
        return AvailableMemory(8 * GIB, "a test")

    tables = 4 * GIB if tier in ("host", "device") else 60 * GIB
    replace(choice_of(tier), read_host=read).shares(tables, 5 * GIB)
    assert len(reads) == count


def test_auto_takes_host_memory_if_tables_do_not_fit_on_the_gpu(caplog):
    shares = choice_of().shares(BUDGET - 8 * GIB + 1, 5 * GIB)
    assert shares == MemoryShares(2 * GIB, None)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "tables of 28.00 GiB stay in host memory (host tier) with a row cache of 2.00 GiB: 36.00"
    )


def test_memory_that_others_use_counts(caplog):
    shares = choice_of(free=34 * GIB).shares(24 * GIB, 5 * GIB)
    assert shares.cache_bytes == 2 * GIB
    assert (
        "30.00 GiB is available (0.9 of cuda:0, --gpu-memory-utilization, less 6.00" in caplog.text
    )
    assert choice_of(free=34 * GIB).shares(22 * GIB, 5 * GIB).cache_bytes is None


def test_auto_takes_the_disk_for_tables_that_fit_nowhere(caplog):
    # 2 GiB of host memory are left to everything else
    auto = choice_of(host=50 * GIB)
    assert auto.shares(48 * GIB, GIB) == MemoryShares(2 * GIB, None)
    caplog.clear()
    assert auto.shares(48 * GIB + GIB // 2, GIB) == MemoryShares(2 * GIB, None, 2 * GIB)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "tables of 48.50 GiB fit neither in the GPU's memory nor in host memory; they stay on disk"
        " (disk tier) with row caches of 2.00 GiB in host memory (--table-cache) and 2.00 GiB in"
        " the GPU's: 36.00 GiB is available"
    )


def test_caches_of_tables_on_disk():
    # the request is the host's cache; the GPU's is what the weights leave, or the default
    disk = choice_of("disk", cache=40 * GIB)
    assert disk.shares(500 * GIB, GIB) == MemoryShares(2 * GIB, None, 40 * GIB)
    assert disk.shares(500 * GIB, 32 * GIB) == MemoryShares(GIB, None, 40 * GIB)
    assert choice_of("disk", host=3 * GIB).shares(500 * GIB, GIB).host_cache_bytes == GIB
    small = choice_of("disk", limits=HostCacheLimits(64 * MIB, 300 * MIB))
    assert small.shares(GIB, GIB) == MemoryShares(300 * MIB, None, 2 * GIB)
    with pytest.raises(ConfigError, match=r"table_cache: takes 63.00 GiB, but other uses leave 62"):
        choice_of("disk", cache=63 * GIB).shares(500 * GIB, GIB)
    # a cache that is larger than the table does not take its size
    assert choice_of("disk", cache=63 * GIB).shares(GIB, GIB).host_cache_bytes == 63 * GIB
    with pytest.raises(ConfigError, match=r"table_tier: disk needs a row cache of 5.00 GiB, but t"):
        wide = HostCacheLimits(5 * GIB, 64 * GIB)
        choice_of("disk", free=9 * GIB, limits=wide).shares(500 * GIB, GIB)


def test_small_tables_are_on_the_gpu_because_a_cache_would_hold_them():
    little = choice_of(free=6 * GIB)
    assert little.shares(256 * MIB, GIB).cache_bytes is None
    assert little.shares(256 * MIB + 1, GIB).cache_bytes == 256 * MIB


def test_a_requested_tier_must_fit():
    assert choice_of("device").shares(BUDGET - 5 * GIB, 5 * GIB).cache_bytes is None
    with pytest.raises(ConfigError, match=r"table_tier: device needs .* the weights leave 31.00 G"):
        choice_of("device").shares(BUDGET - 5 * GIB + 1, 5 * GIB)
    assert choice_of("host").shares(GIB, GIB).cache_bytes == 2 * GIB
    with pytest.raises(ConfigError, match=r"table_tier: tables of 1.00 GiB do not fit in host mem"):
        choice_of("host", host=3 * GIB - 1).shares(GIB, GIB)


def test_a_requested_cache_must_fit_on_the_gpu(caplog):
    assert choice_of("host", cache=8 * GIB).shares(30 * GIB, GIB).cache_bytes == 8 * GIB
    with pytest.raises(ConfigError, match=r"table_cache: takes 8.00 GiB, but the weights leave 7."):
        choice_of("host", cache=8 * GIB, free=13 * GIB - 1).shares(30 * GIB, GIB + GIB // 2)
    caplog.clear()
    assert choice_of(cache=8 * GIB).shares(GIB, GIB).cache_bytes is None
    # a warning, so that it shows without logging setup
    assert "--table-cache is unused" in caplog.messages[0]


def test_the_cache_is_never_smaller_than_its_tables_need(caplog):
    wide = HostCacheLimits(3 * GIB, 64 * GIB)
    assert choice_of("host", limits=wide).shares(30 * GIB, GIB).cache_bytes == 3 * GIB
    assert choice_of(free=9 * GIB, limits=wide).shares(30 * GIB, GIB).cache_bytes == 3 * GIB
    # 4 GiB are left after the weights
    with pytest.raises(ConfigError, match=r"table_cache: the smallest takes 5.00 GiB, but the wei"):
        choice_of(free=9 * GIB, limits=HostCacheLimits(5 * GIB, 64 * GIB)).shares(30 * GIB, GIB)


def test_a_requested_cache_that_is_too_small_is_refused_with_the_smallest_size():
    limits = HostCacheLimits(512 * MIB + 1, 64 * GIB)
    for tier in ("host", "auto"):
        with pytest.raises(ConfigError) as refused:
            choice_of(tier, cache=512 * MIB, limits=limits).shares(40 * GIB, GIB)
        assert str(refused.value) == (
            "table_cache: 512.0 MiB is too small for these tables in host memory; --table-cache"
            " must be at least 513MiB"
        )
        fits = choice_of(tier, cache=513 * MIB, limits=limits).shares(40 * GIB, GIB)
        assert fits.cache_bytes == 513 * MIB
    # a cache that is not used may have any size
    assert choice_of(cache=MIB, limits=limits).shares(GIB, GIB).cache_bytes is None


def test_no_cache_is_larger_than_its_tables_can_use(caplog):
    limits = HostCacheLimits(64 * MIB, 300 * MIB)
    for cache in (None, 8 * GIB):
        chosen = choice_of("host", cache=cache, limits=limits)
        assert chosen.shares(250 * MIB, GIB).cache_bytes == 300 * MIB
    said = "--table-cache 8.00 GiB is more than the tables need: the row cache holds all rows in"
    assert [said in line for line in caplog.messages] == [True]


def test_tables_smaller_than_their_smallest_cache_are_on_the_gpu():
    little = choice_of(free=6 * GIB, limits=HostCacheLimits(GIB, 2 * GIB))
    assert little.shares(GIB, GIB // 2).cache_bytes is None
    assert little.shares(GIB + 1, GIB // 2).cache_bytes == GIB
    # 0.5 GiB are left after the weights
    with pytest.raises(ConfigError, match=r"table_tier: tables need 1.00 GiB, but the weights"):
        little.shares(GIB, 3 * GIB // 2)


def test_a_requested_kv_pool_must_fit_and_others_are_left_to_the_executor():
    assert choice_of().shares(0, GIB) == MemoryShares(None, None)
    fits = choice_of("device", kv=5 * GIB, is_kv_requested=True)
    assert fits.shares(30 * GIB, GIB) == MemoryShares(None, 5 * GIB)
    named = (
        r"kv_cache_gib: 5.00 GiB does not fit: 36.00 GiB is available \(0.9 of cuda:0, .*\), less"
        " 1.00 GiB for weights and 30.50 GiB for table rows leaves 4.50 GiB"
    )
    with pytest.raises(ConfigError, match=named):
        fits.shares(30 * GIB + GIB // 2, GIB)
    with pytest.raises(ConfigError, match=r"and 2.00 GiB for table rows leaves 3.00 GiB"):
        choice_of("host", cache=2 * GIB, kv=5 * GIB, is_kv_requested=True).shares(9 * GIB, 31 * GIB)


def test_weights_larger_than_the_gpu_are_refused():
    with pytest.raises(ConfigError, match=r"device: the weights take 37.00 GiB, but 36.00 GiB is"):
        choice_of().shares(0, 37 * GIB)


def test_settings_of_tables_need_tables():
    for tier in ("host", "disk"):
        with pytest.raises(ConfigError, match=f"table_tier: {tier} requires value tables"):
            choice_of(tier).shares(0, GIB)
    with pytest.raises(ConfigError, match="table_cache: requires value tables"):
        choice_of(cache=GIB).shares(0, GIB)


def test_unknown_host_memory_matters_only_if_it_decides(caplog):
    def silent() -> AvailableMemory:
        raise OSError("no meminfo")

    def read_gpu(device: torch.device) -> tuple[int, int]:
        return TOTAL, TOTAL

    auto, host, disk = (
        GpuTierChoice(MemoryRequest(GIB, None, GIB, tier), GPU, 0.9, LIMITS, read_gpu, silent)
        for tier in ("auto", "host", "disk")
    )
    assert auto.shares(GIB, GIB).cache_bytes is None
    with pytest.raises(ConfigError, match=r"table_tier: auto cannot read .* host .*no meminfo"):
        auto.shares(40 * GIB, GIB)
    assert host.shares(40 * GIB, GIB).cache_bytes == GIB
    assert "host memory is not checked" in caplog.messages[-1]
    assert disk.shares(40 * GIB, GIB) == MemoryShares(GIB, None, GIB)


@pytest.mark.parametrize(
    ("row_bytes", "is_cached", "remedy"),
    [
        (0, False, "use another GPU"),
        (30 * GIB, False, "use --table-tier host, --table-dtype int8 or another GPU"),
        (30 * GIB, True, "use a smaller --table-cache or another GPU"),
    ],
)
def test_lack_of_memory_while_loading_says_what_to_change(row_bytes, is_cached, remedy):
    def read_gpu(device: torch.device) -> tuple[int, int]:
        return 8 * GIB, TOTAL

    lacking = naming_lack_of_memory(GPU, 9 * GIB, row_bytes, is_cached, read_gpu)
    with pytest.raises(ConfigError) as refused, lacking:
        raise torch.OutOfMemoryError("CUDA out of memory")
    rows = "30.00 GiB" if row_bytes else "0.0 MiB"
    assert str(refused.value) == (
        f"device: cuda:0 is out of memory: weights take 9.00 GiB and table rows {rows}, but 8.00"
        f" GiB of 40.00 GiB was free; {remedy}"
    )


def test_a_smaller_row_cache_does_not_help_tables_on_disk():
    lacking = naming_lack_of_memory(
        GPU, 9 * GIB, GIB, True, lambda device: (8 * GIB, TOTAL), is_on_disk=True
    )
    with pytest.raises(ConfigError, match="was free; use another GPU$"), lacking:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_cpu_is_not_asked_for_its_memory():
    def fail(device: torch.device) -> tuple[int, int]:
        raise AssertionError("no GPU")

    with naming_lack_of_memory(torch.device("cpu"), GIB, GIB, False, fail):
        assert True


def test_memory_of_row_patches_must_fit():
    for tier, table in (("auto", GIB), ("device", GIB), ("host", GIB), ("auto", 0)):
        with pytest.raises(
            ConfigError, match="^patch_memory_gib: 500.00 GiB does not fit: the wei"
        ):
            choice_of(tier, patches=500 * GIB).shares(table, GIB)
    named = "^table_tier: device needs 34.00 GiB, but the weights and row patches leave 33.00 GiB"
    with pytest.raises(ConfigError, match=named):
        choice_of("device", patches=2 * GIB).shares(34 * GIB, GIB)
    choice = choice_of("device", patches=2 * GIB, is_kv_requested=True)
    assert choice.shares(31 * GIB, GIB).kv_bytes == 2 * GIB
    with pytest.raises(ConfigError, match="^kv_cache_gib: 2.00 GiB .* 2.00 GiB for row patches"):
        choice.shares(32 * GIB, GIB)
