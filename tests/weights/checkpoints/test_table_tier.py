"""What ``auto`` decides, by figures of memory that are given to it."""

import logging

import pytest

from engine.errors import ConfigError
from memory_ops.native import disk_rows
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from server import engine_entry
from server.config import ModelOptions
from server.engine_entry import load_served
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.available_memory import AvailableMemory
from weights.checkpoints.table_tier import TierChoice

MIB, GIB = 2**20, 2**30


def choice_of(available: int, asked: int | None = None, tier: str = "auto") -> TierChoice:
    return TierChoice(GIB, asked, 2 * GIB, tier, lambda: AvailableMemory(available, "a test"))


def decided(caplog, available: int, table: int, asked: int | None = None) -> tuple[int | None, str]:
    """The memory for rows on disk, and the line that was logged."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    cache = choice_of(available, asked).cache_bytes(table, weight_bytes=GIB // 2)
    (record,) = caplog.records
    return cache, record.getMessage()


def test_a_table_is_held_where_it_fits_beside_weights_and_kv_blocks(caplog):
    cache, line = decided(caplog, 12 * GIB, 10 * GIB)
    assert cache is None
    assert line == (
        "tables of 10.00 GiB are held in memory (device): 12.00 GiB is available (a test), less"
        " 512.0 MiB for weights, 1.00 GiB for KV blocks and 512.0 MiB for a step"
    )
    cache, line = decided(caplog, 12 * GIB - 1, 10 * GIB)
    assert cache == 2 * GIB and caplog.records[0].levelno == logging.WARNING
    assert line.startswith(
        "tables of 10.00 GiB stay on disk, 2.00 GiB of memory are for their rows: "
    )


def test_the_cache_is_that_asked_for_else_no_more_than_there_is(caplog):
    assert decided(caplog, 3 * GIB, 10 * GIB)[0] == GIB
    assert decided(caplog, 0, 10 * GIB)[0] == 256 * MIB
    assert decided(caplog, 3 * GIB, 10 * GIB, 5 * MIB)[0] == 5 * MIB


def test_what_the_disk_tier_would_hold_in_memory_is_held_in_memory(caplog):
    cache, line = decided(caplog, 0, 256 * MIB)
    assert cache is None and "as the disk tier may take 256.0 MiB" in line
    assert decided(caplog, 0, 256 * MIB + 1)[0] is not None


def test_a_large_cache_is_no_reason_to_hold_a_table_that_does_not_fit(caplog):
    # beside the weights there is room for the cache, beside KV blocks and a step for less
    cache, line = decided(caplog, 3 * GIB, 2 * GIB, 2 * GIB)
    assert cache == 2 * GIB and "stay on disk" in line


@pytest.mark.parametrize("tier", ["auto", "disk"])
def test_a_cache_that_memory_has_no_room_for_is_refused(tier):
    asked = choice_of(3 * GIB, 5 * GIB, tier)
    with pytest.raises(ConfigError, match=r"table_cache: takes 5.00 GiB, and 2.50 GiB is left"):
        asked.cache_bytes(10 * GIB, GIB // 2)
    # no cache takes more than the table
    assert asked.cache_bytes(5 * GIB // 2, GIB // 2) == 5 * GIB


def test_a_default_cache_on_disk_has_to_fit_too():
    assert choice_of(3 * GIB, tier="disk").cache_bytes(10 * GIB, GIB // 2) == 2 * GIB
    with pytest.raises(ConfigError, match=r"table_cache: takes 2.00 GiB"):
        choice_of(2 * GIB, tier="disk").cache_bytes(10 * GIB, GIB // 2)


def test_a_table_that_does_not_fit_on_the_device_is_refused():
    device = choice_of(3 * GIB, tier="device")
    assert device.cache_bytes(5 * GIB // 2, GIB // 2) is None
    named = r"table_tier: device needs 2.50 GiB, and 2.50 GiB is left .* \(3.00 GiB is available: a"
    with pytest.raises(ConfigError, match=named):
        device.cache_bytes(5 * GIB // 2 + 1, GIB // 2)
    # what is available is an estimate, which refuses no small table
    assert choice_of(0, tier="device").cache_bytes(256 * MIB, GIB) is None


def test_a_cache_that_is_not_used_is_told_of(caplog):
    assert "--table-cache is not used" in decided(caplog, 9 * GIB, GIB, 5 * MIB)[1]
    # also where nothing sets logging up
    assert caplog.records[0].levelno == logging.WARNING
    assert "--table-cache" not in decided(caplog, 9 * GIB, GIB)[1]
    assert "--table-cache" not in decided(caplog, 0, GIB, 5 * MIB)[1]


def test_a_system_that_does_not_tell_is_told_of():
    def silent():
        raise ValueError("no MemAvailable")

    with pytest.raises(ConfigError, match=r"table_tier: auto cannot tell .*no MemAvailable"):
        TierChoice(GIB, None, GIB, available=silent).cache_bytes(GIB, GIB)
    assert TierChoice(GIB, None, GIB, "device", silent).cache_bytes(GIB, GIB) is None
    assert TierChoice(GIB, None, GIB, "disk", silent).cache_bytes(GIB, GIB) == GIB


@pytest.fixture
def memory(monkeypatch):
    """Says how much memory there is, from 300 MiB for tables on."""
    found = {"bytes": 0}

    class Told(TierChoice):
        def __init__(self, *arguments):
            super().__init__(*arguments, lambda: AvailableMemory(found["bytes"], "a test"))

    monkeypatch.setattr(engine_entry, "TierChoice", Told)
    monkeypatch.setattr("weights.checkpoints.table_tier._LEAST_CACHE_BYTES", 3000)
    return found


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_auto_serves_from_memory_or_disk_by_the_dtype_asked_for(tmp_path, memory):
    changes = feed_forward_changes("memory_plus", "dense")
    folder = save_model(random_model(tiny_config(**changes)), tmp_path / "model")
    # 8,192 bytes of fp32 rows, 4,096 of bfloat16
    dense = sum(one.numel() for one in random_model(tiny_config(**changes)).parameters()) * 4
    needed = dense + GIB + 512 * MIB

    def table(**options):
        model = load_served(ModelOptions(str(folder), **options), folder, kv_bytes=GIB).model
        return model.model.layers[0].memory.table

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
    load_served(ModelOptions(str(folder)), folder, kv_bytes=GIB)
    assert not caplog.records
    with pytest.raises(ConfigError, match="table_cache: is for value tables"):
        load_served(ModelOptions(str(folder), table_cache="1GiB"), folder, kv_bytes=GIB)
    with pytest.raises(ConfigError, match="table_tier: disk is for value tables"):
        load_served(ModelOptions(str(folder), table_tier="disk"), folder, kv_bytes=GIB)


def test_the_default_model_is_held_in_memory():
    folder = engine_entry.prepared_folder("wordnet", None)
    model = load_served(ModelOptions(), folder, kv_bytes=GIB).model
    assert type(model.model.layers[1].memory.table) is DeviceTable


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"table_tier": "host"}, "table_tier: host needs a GPU"),
        ({"table_tier": "tape"}, "table_tier: 'tape' is none of"),
        ({"table_tier": "device", "table_cache": "1GiB"}, "table_cache: is for --table-tier disk"),
        ({"table_cache": "1GB"}, "table_cache: expected a number"),
        ({"table_cache": "0MiB"}, "table_cache: must be more than nothing, not 0MiB"),
        ({"table_lookahead_share": 0.5}, "table_lookahead_share: is for --table-lookahead"),
        ({"table_lookahead": 1, "table_lookahead_share": 9.0}, "_share: 9.0 is outside"),
    ],
)
def test_options_that_cannot_be_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        ModelOptions(**options)
