"""The choice of the table tier and of KV blocks for given amounts of memory."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from memory_ops.native import disk_rows
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from server import engine_entry, model_loading
from server.model_loading import load_served
from server.model_options import ModelOptions
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.available_memory import AvailableMemory
from weights.checkpoints.memory_request import MemoryRequest, MemoryShares
from weights.checkpoints.table_tier import CpuTierChoice, check_rows_fit
from weights.grammars.grammar_memory import GRAMMARS_BYTES
from weights.models.named_models import WORDNET
from weights.models.prepare import prepared_folder

MIB, GIB = 2**20, 2**30
ASKED = EngineConfig(kv_cache_gib=1.0)
CPU = torch.device("cpu")


def choice_of(available: int, asked: int | None = None, tier: str = "auto") -> CpuTierChoice:
    request = MemoryRequest(GIB, asked, 2 * GIB, tier)
    return CpuTierChoice(request, lambda: AvailableMemory(available, "a test"))


def decided(caplog, available: int, table: int, asked: int | None = None) -> tuple[int | None, str]:
    """(cache bytes of the disk tier or None, the logged line)."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    cache = choice_of(available, asked).shares(table, weight_bytes=GIB // 2).cache_bytes
    record = caplog.records[0]
    return cache, record.getMessage()


def test_a_table_is_in_memory_if_it_fits_with_weights_and_kv_blocks(caplog):
    cache, line = decided(caplog, 12 * GIB, 10 * GIB)
    assert cache is None
    assert line == (
        "tables of 10.00 GiB are loaded into memory (device tier): 12.00 GiB is available (a test),"
        " less 512.0 MiB for weights, 1.00 GiB for the KV pool and 512.0 MiB for a step"
        " and grammars"
    )
    cache, line = decided(caplog, 12 * GIB - 1, 10 * GIB)
    assert cache == 2 * GIB and caplog.records[0].levelno == logging.WARNING
    assert line.startswith("tables of 10.00 GiB stay on disk with a row cache of 2.00 GiB: ")


def test_the_cache_has_the_requested_size_or_fits_into_memory(caplog):
    assert decided(caplog, 3 * GIB, 10 * GIB)[0] == GIB
    assert decided(caplog, 0, 10 * GIB)[0] == 256 * MIB
    assert decided(caplog, 3 * GIB, 10 * GIB, 5 * MIB)[0] == 5 * MIB


def test_a_table_no_larger_than_the_default_cache_is_in_memory(caplog):
    cache, line = decided(caplog, 0, 256 * MIB)
    assert cache is None and "they fit in a cache of 256.0 MiB" in line
    assert decided(caplog, 0, 256 * MIB + 1)[0] is not None


def test_a_large_cache_does_not_bring_a_table_that_does_not_fit_into_memory(caplog):
    # the cache fits after the weights; less is left after KV blocks and a step
    cache, line = decided(caplog, 3 * GIB, 2 * GIB, 2 * GIB)
    assert cache == 2 * GIB and "stay on disk" in line


@pytest.mark.parametrize("tier", ["auto", "disk"])
def test_a_cache_larger_than_memory_is_refused(tier):
    asked = choice_of(3 * GIB, 5 * GIB, tier)
    with pytest.raises(
        ConfigError, match=r"table_cache: takes 5.00 GiB, but the weights leave 2.50"
    ):
        asked.shares(10 * GIB, GIB // 2)
    # the cache is capped at the size of the table
    assert asked.shares(5 * GIB // 2, GIB // 2).cache_bytes == 5 * GIB


def test_the_default_cache_must_fit_too():
    assert choice_of(3 * GIB, tier="disk").shares(10 * GIB, GIB // 2).cache_bytes == 2 * GIB
    with pytest.raises(ConfigError, match=r"table_cache: takes 2.00 GiB"):
        choice_of(2 * GIB, tier="disk").shares(10 * GIB, GIB // 2)


def test_a_table_that_does_not_fit_on_the_device_is_refused():
    device = choice_of(3 * GIB, tier="device")
    assert device.shares(5 * GIB // 2, GIB // 2).cache_bytes is None
    named = r"table_tier: device needs 2.50 GiB, but .* leave 2.50 GiB \(3.00 GiB is available: a"
    with pytest.raises(ConfigError, match=named):
        device.shares(5 * GIB // 2 + 1, GIB // 2)
    # available memory is an estimate, so small tables are never refused
    assert choice_of(0, tier="device").shares(256 * MIB, GIB).cache_bytes is None


def test_an_unused_cache_option_is_logged(caplog):
    assert "--table-cache is unused" in decided(caplog, 9 * GIB, GIB, 5 * MIB)[1]
    # a warning, so that it shows without logging setup
    assert caplog.records[0].levelno == logging.WARNING
    assert "--table-cache" not in decided(caplog, 9 * GIB, GIB)[1]
    assert "--table-cache" not in decided(caplog, 0, GIB, 5 * MIB)[1]


def test_a_cache_larger_than_all_rows_need_takes_them_all_and_says_so(caplog):
    def lines(asked):
        caplog.clear()
        request = MemoryRequest(0, asked, 2 * GIB, "disk")
        available = AvailableMemory(4 * GIB, "a test")
        choice = CpuTierChoice(request, lambda: available, largest_cache=12 * MIB)
        assert choice.shares(10 * MIB, weight_bytes=GIB).cache_bytes == (asked or 2 * GIB)
        return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]

    assert lines(999 * GIB) == [
        "--table-cache 999.00 GiB is more than the tables need: the row cache holds all rows in"
        " 12.0 MiB"
    ]
    assert lines(12 * MIB) == lines(None) == []


def test_unknown_available_memory_is_an_error_or_logged(caplog):
    def silent():
        raise ValueError("no MemAvailable")

    auto, device, disk = (
        CpuTierChoice(MemoryRequest(GIB, None, GIB, tier), silent)
        for tier in ("auto", "device", "disk")
    )
    with pytest.raises(ConfigError, match=r"table_tier: auto cannot read .*no MemAvailable"):
        auto.shares(GIB, GIB)
    assert device.shares(GIB, GIB).cache_bytes is None
    assert disk.shares(GIB, GIB).cache_bytes == GIB
    # without tables there is nothing to decide
    assert auto.shares(0, GIB) == MemoryShares(None, GIB)
    assert "memory limits are not checked" in caplog.messages[-1]


def test_rows_that_exceed_the_memory_are_refused_with_both_sizes():
    available = partial(AvailableMemory, 3 * GIB, "MemAvailable")
    check_rows_fit(Path("model"), 3 * GIB, available)
    message = r"^model: the table rows take 3\.50 GiB of memory, but 3\.00 GiB is available \(Mem"
    with pytest.raises(ConfigError, match=message):
        check_rows_fit(Path("model"), 7 * GIB // 2, available)
    # available memory is an estimate, so small tables are never refused
    check_rows_fit(Path("model"), 256 * MIB, partial(AvailableMemory, 0, "MemAvailable"))


@pytest.fixture
def memory(monkeypatch):
    """Sets the available memory (key ``bytes``) and lowers the minimal sizes."""
    found = {"bytes": 0}

    def choice(request, largest_cache):
        available = partial(AvailableMemory, found["bytes"], "a test")
        return CpuTierChoice(request, available, largest_cache)

    monkeypatch.setattr(model_loading, "CpuTierChoice", choice)
    monkeypatch.setattr("weights.checkpoints.memory_request.MIN_CACHE_BYTES", 3000)
    monkeypatch.setattr("weights.checkpoints.memory_request._MIN_KV_BYTES", 3000)
    return found


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_auto_serves_from_memory_or_disk_by_the_dtype_asked_for(tmp_path, memory):
    changes = feed_forward_changes("memory_plus", "dense")
    folder = save_model(random_model(tiny_config(**changes)), tmp_path / "model")
    # rows take 8,192 bytes in fp32 and 4,096 in bfloat16
    dense = sum(one.numel() for one in random_model(tiny_config(**changes)).parameters()) * 4
    needed = dense + GIB + 512 * MIB + GRAMMARS_BYTES + ASKED.patch_bytes

    def table(**options):
        loaded = load_served(ModelOptions(str(folder), **options), folder, ASKED, CPU)
        return loaded.model.model.layers[0].memory.table

    memory["bytes"] = needed + 8192
    assert type(table()) is DeviceTable
    memory["bytes"] -= 1
    assert type(table()) is DiskTable
    assert type(table(table_dtype="bfloat16")) is DeviceTable
    assert type(table(table_tier="device")) is DeviceTable
    held = table(table_cache="4KiB")
    assert type(held) is DiskTable and held.num_slots == 4096 // (128 + 40)
    memory["bytes"] = needed
    with pytest.raises(ConfigError, match="memplus quantize .* --table-dtype bfloat16"):
        table(table_dtype="bfloat16")


def test_a_model_without_tables_has_no_tier(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    load_served(ModelOptions(str(folder)), folder, None, CPU)
    assert not caplog.records
    with pytest.raises(ConfigError, match="table_cache: requires value tables"):
        load_served(ModelOptions(str(folder), table_cache="1GiB"), folder, ASKED, CPU)
    with pytest.raises(ConfigError, match="table_tier: disk requires value tables"):
        load_served(ModelOptions(str(folder), table_tier="disk"), folder, ASKED, CPU)


def test_the_default_model_is_held_in_memory():
    folder = prepared_folder(WORDNET, Path())
    loaded = load_served(ModelOptions(), folder, ASKED, CPU)
    assert type(loaded.model.model.layers[1].memory.table) is DeviceTable


def kv_share(available, asked=False, table=0, tier="auto", patches=0):
    read_available = partial(AvailableMemory, available, "a test")
    request = MemoryRequest(2 * GIB, None, GIB, tier, is_kv_requested=asked, patch_bytes=patches)
    return CpuTierChoice(request, read_available).shares(table, weight_bytes=GIB // 4).kv_bytes


def test_kv_blocks_get_the_remaining_memory_even_without_tables(caplog):
    caplog.set_level(logging.INFO)
    assert kv_share(GIB) == GIB // 4
    assert caplog.messages == [
        "KV pool takes 256.0 MiB: 1.00 GiB is available (a test), less 256.0 MiB for weights,"
        " 0.0 MiB for table rows and 512.0 MiB for a step and grammars"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    assert kv_share(9 * GIB) == 2 * GIB and caplog.records[0].levelno == logging.INFO
    # available memory is an estimate, so a minimum is always tried
    assert kv_share(0) == 64 * MIB


def test_kv_blocks_get_the_memory_that_table_rows_leave():
    assert kv_share(4 * GIB, table=2 * GIB, tier="device") == 5 * GIB // 4
    # rows on disk take a cache of 1 GiB
    assert kv_share(3 * GIB, table=9 * GIB, tier="disk") == 5 * GIB // 4
    assert kv_share(3 * GIB, table=GIB // 2, tier="disk") == 7 * GIB // 4


def test_memory_of_row_patches_is_reserved(caplog):
    caplog.set_level(logging.INFO)
    assert kv_share(2 * GIB, patches=GIB // 2) == 3 * GIB // 4
    assert caplog.messages[0].endswith("and 1.00 GiB for a step, grammars and patches")
    kv_share(9 * GIB, table=GIB, patches=GIB // 2)
    assert caplog.messages[1].endswith("and 1.00 GiB for a step, grammars and patches")


def test_requested_kv_blocks_fit_or_are_refused():
    assert kv_share(9 * GIB // 4, asked=True) == 2 * GIB
    named = (
        r"kv_cache_gib: 2.00 GiB does not fit: 2.25 GiB is available \(a test\), less 256.0 MiB for"
        " weights and 0.0 MiB for table rows leaves 2.00 GiB"
    )
    with pytest.raises(ConfigError, match=named):
        kv_share(9 * GIB // 4 - 1, asked=True)
    with pytest.raises(ConfigError, match="and 1.00 GiB for table rows leaves 1.00 GiB"):
        kv_share(9 * GIB // 4, asked=True, table=GIB, tier="device")


def test_little_memory_gives_fewer_kv_blocks(tmp_path, memory):
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    # 64 sequences of 512 positions, of 2 layers x 2 x 2 KV heads x 8 dims x 4 bytes
    most = 64 * 512 * 256
    weights = sum(one.numel() for one in random_model(tiny_config()).parameters()) * 4

    def blocks(**config):
        loaded = load_served(ModelOptions(str(folder)), folder, EngineConfig(**config), CPU)
        engine = engine_entry.served_engine(loaded, EngineConfig(**config))
        return engine.statistics().kv_blocks_total

    memory["bytes"] = 2 * GIB
    assert blocks() == most // (16 * 256)
    assert blocks(max_num_seqs=3, max_model_len=17) == 3 * 2
    memory["bytes"] = weights + 512 * MIB + GRAMMARS_BYTES + most // 2
    assert blocks() == most // 2 // (16 * 256)
    memory["bytes"] = weights + GIB // 4 - 1
    with pytest.raises(ConfigError, match=r"kv_cache_gib: 256.0 MiB does not fit: .* \(a test\)"):
        blocks(kv_cache_gib=0.25)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"table_tier": "tape"}, "table_tier: 'tape' is not one of"),
        ({"device": "tpu"}, "device: must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ({"device": "cuda:"}, "device: must be auto, cpu, cuda or cuda:N, not 'cuda:'"),
        ({"dtype": "float8"}, "dtype: 'float8' is not one of auto, bfloat16, float16, float32"),
        (
            {"table_tier": "device", "table_cache": "1GiB"},
            "table_cache: needs --table-tier host, disk",
        ),
        ({"table_cache": "1GB"}, "table_cache: must be a number"),
        ({"table_cache": "0MiB"}, "table_cache: must be more than 0, not 0MiB"),
        ({"table_lookahead_share": 0.5}, "table_lookahead_share: needs --table-lookahead"),
        ({"table_lookahead": 1, "table_lookahead_share": 9.0}, "_share: 9.0 is outside"),
    ],
)
def test_conflicting_options_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        ModelOptions(**options)


def test_memory_of_row_patches_must_fit():
    def choice(patches, tier="auto", kv=GIB):
        request = MemoryRequest(kv, GIB, GIB, tier, is_kv_requested=True, patch_bytes=patches)
        return CpuTierChoice(request, lambda: AvailableMemory(4 * GIB, "a test"))

    for tier, table in (("auto", GIB), ("device", GIB), ("disk", GIB), ("auto", 0)):
        named = (
            r"^patch_memory_gib: 500.00 GiB does not fit: the weights leave 3.00 GiB \(4.00 GiB is"
        )
        with pytest.raises(ConfigError, match=named):
            replace_cache(choice(500 * GIB, tier), table).shares(table, GIB)
    assert choice(GIB, "device").shares(GIB, GIB) == MemoryShares(None, GIB)
    named = "^table_tier: device needs 2.00 GiB, but the weights and row patches leave 1.00 GiB"
    with pytest.raises(ConfigError, match=named):
        choice(2 * GIB, "device").shares(2 * GIB, GIB)
    with pytest.raises(ConfigError, match="^table_cache: takes 1.00 GiB, but the weights and row"):
        choice(5 * GIB // 2, "disk").shares(2 * GIB, GIB)
    named = "^kv_cache_gib: 1.50 GiB .* 1.00 GiB for table rows and 1.00 GiB for row patches leaves"
    with pytest.raises(ConfigError, match=named):
        choice(GIB, "device", kv=3 * GIB // 2).shares(GIB, GIB)


def replace_cache(choice: CpuTierChoice, table: int) -> CpuTierChoice:
    """The choice; a model without tables takes no row cache."""
    return (
        choice if table else replace(choice, request=replace(choice.request, requested_cache=None))
    )
