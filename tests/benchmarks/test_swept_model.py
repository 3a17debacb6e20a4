"""``memplus bench memory`` on a model with memory layers: own and drawn tables, points, errors."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import disk_meter
from benchmarks.access_trace import record
from benchmarks.memory import sweep
from benchmarks.memory.load import MemoryLoad
from benchmarks.memory.points import points
from benchmarks.memory.swept_model import SweptModel
from benchmarks.random_memory import write_resized
from benchmarks.row_trace import AccessTrace
from engine.errors import ConfigError
from memory_ops.native import disk_rows
from memory_ops.row_formats import row_bytes
from memory_ops.tables.disk import row_cache_bytes
from server.cli.main import main
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.checkpoints.hot_rows import HOT_ROWS_FILE, hot_rows_content
from weights.errors import DataError

KINDS = "memory_plus", "dense", "peer"
SUBKEYS = "model.layers.0.memory.subkeys"


def model_of(folder, *kinds, **memory):
    config = tiny_config(**feed_forward_changes(*kinds, **memory), head_dim=16)
    return save_model(random_model(config, torch.bfloat16), folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four tables: one of Memory+, two of PEER, and one of the other Memory+ layer."""
    folder = tmp_path_factory.mktemp("own") / "model"
    return model_of(folder, *KINDS, "memory_plus", share_values=False)


@pytest.fixture(scope="module")
def model(source):
    return SweptModel.open(source)


def trace_of(model, num_rows=64, layers=3):
    shape = 40, layers, model.memory.num_heads, model.memory.top_k
    rows = np.random.default_rng(0).integers(num_rows, size=shape)
    return AccessTrace(rows, np.zeros((layers, num_rows), dtype=np.int64), 40)


def test_by_default_a_model_is_measured_with_its_own_rows(model):
    load = model.settled(MemoryLoad(), has_trace=False)
    assert (load.rows, load.row_dtypes, load.skews) == ((64,), ("bfloat16",), ("zipf",))
    assert model.settled(MemoryLoad(), has_trace=True).skews == ("recorded",)
    described = "3 memory_plus and peer layers of 2 heads x 3 rows; 4 tables of 64 rows x 32"
    assert f"{described} bfloat16" in model.describe()
    kept = MemoryLoad(rows=(256,), row_dtypes=("int8",), skews=("uniform",))
    assert model.settled(kept, has_trace=False) == kept


def test_every_cache_share_is_a_point_of_the_disk_tier_alone(model):
    load = MemoryLoad(
        rows=(64, 144), tiers=("device", "disk"), batches=(1,), cache_shares=(0.5, 0.25)
    )
    load = model.settled(replace(load, row_dtypes=("int8",)), has_trace=False)
    found = points(model, load)
    assert [(one.rows, one.is_own, one.tier, share) for one, share in found.items()] == [
        (rows, rows == 64, tier, share)
        for rows in (64, 144)
        for tier, share in (("device", None), ("disk", 0.5), ("disk", 0.25))
    ]
    # each of the four tables gets a quarter of the cache
    size = row_bytes("int8", 32)
    wanted = [0, 4 * row_cache_bytes(72, size, 144), 4 * row_cache_bytes(36, size, 144)]
    assert [one.cache_bytes for one in found if one.rows == 144] == wanted


def test_own_rows_are_used_in_place_and_others_are_drawn(model, tmp_path):
    assert model.folder(tmp_path, 64, "bfloat16") == model.source
    drawn = model.folder(tmp_path, 144, "int8")
    assert model.folder(tmp_path, 144, "int8") == drawn
    (before, _), (after, config) = load_model(model.source), load_model(drawn)
    assert config.model.memory == replace(model.memory, num_subkeys=12)
    assert {table.num_rows for table in after.tables.values()} == {144}
    assert {table.rows.row_format for table in after.tables.values()} == {"int8"}
    theirs, ours = before.state_dict(), after.state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in ours.items():
        if name.endswith("subkeys"):
            assert weight.shape == (2, 2, 12, 4) and weight.std() > 0.1
        else:
            assert torch.equal(weight, theirs[name])
    converted = model.folder(tmp_path, 64, "int8")
    (own, _), name = load_model(converted), "model.layers.0.memory.table"
    assert own.tables[name].rows.row_format == "int8"
    assert torch.equal(own.state_dict()[SUBKEYS], theirs[SUBKEYS])


def test_hot_rows_of_the_own_tables_stay_behind(tmp_path):
    source = model_of(tmp_path / "model", "pkm", "dense")
    hot = hot_rows_content({"memory.table": torch.tensor([63])})
    (source / HOT_ROWS_FILE).write_bytes(hot)
    write_resized(source, tmp_path / "small", 4, "bfloat16")
    assert not (tmp_path / "small" / HOT_ROWS_FILE).exists()
    model, _ = load_model(tmp_path / "small")
    assert model.tables["memory.table"].num_rows == 16


@pytest.mark.parametrize(
    ("change", "has_trace", "said"),
    [
        ({"rows": (4,)}, False, "rows: 4 are too few: a head reads 3 rows"),
        ({"skews": ("zipf",)}, True, "trace: has no effect unless skews has recorded"),
        ({"cache_shares": (0.05,)}, False, "cache_shares: 0.05 of 64 rows are 3, but one token"),
        ({"prompt_lens": (512,)}, False, "prompt_lens: 512 must be below 512"),
        ({"output_len": 481}, False, "output_len: 481 is too long"),
    ],
)
def test_loads_that_a_model_cannot_run_are_refused(model, change, has_trace, said):
    with pytest.raises(ConfigError, match=said):
        points(model, model.settled(MemoryLoad(**change), has_trace=has_trace))


def test_rows_of_few_bits_are_not_converted_again(source, tmp_path):
    convert(source, tmp_path / "int8", table_dtype="int8")
    model = SweptModel.open(tmp_path / "int8")
    assert model.settled(MemoryLoad(), has_trace=False).row_dtypes == ("int8",)
    with pytest.raises(ConfigError, match="row_dtypes: the model's own rows are int8 already"):
        model.settled(MemoryLoad(row_dtypes=("bfloat16",)), has_trace=False)
    drawn = MemoryLoad(rows=(144,), row_dtypes=("bfloat16",))
    assert model.settled(drawn, has_trace=False) == replace(drawn, skews=("zipf",))


def test_only_a_trace_of_the_model_is_replayed(model, tmp_path):
    load, file = model.settled(MemoryLoad(rows=(64, 256)), has_trace=True), tmp_path / "trace.npz"
    trace_of(model).save(file)
    assert len(model.trace(file, load).rows_TMHK) == 40
    how = "`memplus bench trace TEXTS --model"
    trace_of(model, layers=2).save(file)
    with pytest.raises(DataError, match=rf"has \(2, 2, 3\) memory layers.*not \(3, 2, 3\).*{how}"):
        model.trace(file, load)
    trace_of(model, num_rows=128).save(file)
    with pytest.raises(ConfigError, match=f"tables of 128 rows, but the model's have 64.*{how}"):
        model.trace(file, load)
    trace_of(model).save(file)
    with pytest.raises(ConfigError, match="rows: 144 is neither a multiple nor a divisor of"):
        model.trace(file, replace(load, rows=(144,)))
    with pytest.raises(ConfigError, match=f"skews: recorded needs a trace of this model.*{how}"):
        sweep.measure(model.source, replace(load, skews=("recorded",)), None, tmp_path, None)


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "memory", "dtype"),
    [
        (("memory_plus", "dense", "memory_plus"), {}, "bfloat16"),
        (("pkm", "dense", "pkm"), {"share_values": False, "value_projection": True}, "int4_row"),
        (("peer", "dense", "peer"), {"share_values": False}, "bfloat16"),
        (("peer", "dense", "memory_plus"), {"placement": "beside", "qk_norm": True}, "int8"),
    ],
)
def test_models_of_every_kind_are_measured(kinds, memory, dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(disk_meter, "_MOST_READS", 500)
    source = model_of(tmp_path / "model", *kinds, **memory)
    hot = {name: torch.arange(60) for name in SweptModel.open(source).config.table_names}
    (source / HOT_ROWS_FILE).write_bytes(hot_rows_content(hot))
    (tmp_path / "text.txt").write_text("words that are read " * 20)
    record(source, [str(tmp_path / "text.txt")], 300, 200).save(tmp_path / "trace.npz")
    file, out = tmp_path / "memory.json", tmp_path / "out"
    arguments = [
        *("bench", "memory", "--model", str(source), "--out", str(out), "--json", str(file)),
        *("--rows", "64", "256", "--row-dtypes", dtype, "--batches", "2"),
        *("--tiers", "device", "disk", "mmap", "--cache-shares", "0.2", "0.5", "--lookahead", "1"),
        *("--trace", str(tmp_path / "trace.npz")),
        *("--output-len", "2", "--rounds", "1", "--prompt-lens", "20", "--cold"),
    ]
    assert main(arguments) == 0
    results = json.loads(file.read_text())
    # the device and mmap tiers once, the disk tier for every cache share
    assert len(results) == 2 * 4 * 2
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 + len(results) and "rows x 32 bfloat16" in printed[0]
    for line, result in zip(printed[3:], results, strict=True):
        one = SimpleNamespace(**result)
        assert one.tokens_per_s > 0 and one.is_own == (one.rows == 64)
        assert (" own " in line) == one.is_own
        assert (one.model, one.own_rows) == (str(source), 64)
        if one.tier == "disk":
            # a cold cache, hot rows left out, misses something
            assert one.hit_rate < 1
    kept = (out / "rounds.jsonl").read_text()
    assert main(arguments) == 0
    assert (out / "rounds.jsonl").read_text() == kept


def test_rounds_that_were_saved_before_own_tables_are_kept(tmp_path):
    source = save_model(random_model(tiny_config(num_layers=8)), tmp_path / "model")
    plain = SweptModel.open(source)
    first, *others = points(plain, plain.settled(MemoryLoad(), has_trace=False))
    assert first.skew == "recorded" and not any(one.is_own for one in (first, *others))
    saved = {name: value for name, value in asdict(first).items() if name != "is_own"}
    done = {"tokens_per_s": 1.0, "seconds": 1.0, "hit_rate": None}
    (tmp_path / "rounds.jsonl").write_text(json.dumps({"point": saved, "round": done}) + "\n")
    assert sweep.Rounds(tmp_path / "rounds.jsonl").number(first) == 1
