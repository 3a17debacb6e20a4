"""``memplus bench memory``: replayed reads, saved rounds, consistent results."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import disk_meter
from benchmarks.memory.access import DrawnAccess, RecordedAccess
from benchmarks.memory.load import MemoryLoad, Point, Round
from benchmarks.memory.planned import planned_tokens_per_s
from benchmarks.memory.replayed import Replay, ReplayedTable
from benchmarks.memory.sweep import measure
from benchmarks.row_trace import AccessTrace, checked_trace
from engine.errors import ConfigError
from memory_ops.native import disk_rows
from memory_ops.native.row_fetcher import START, RowFetcher
from memory_ops.tables.device import DeviceTable
from server.cli.main import main
from tests.models import random_model, save_model, tiny_config
from weights.errors import DataError


def trace(num_rows=1024):
    generator = np.random.default_rng(0)
    rows = generator.integers(num_rows, size=(40, 3, 4, 32))
    return AccessTrace(rows, np.zeros((3, num_rows), dtype=np.int64), 40)


def test_recorded_reads_are_replayed_in_order():
    recorded = trace()
    access = RecordedAccess(recorded, 1024)
    first = access.rows(0, 0, 1)
    assert torch.equal(first, torch.from_numpy(recorded.rows_TMHK[20, 1]))
    assert torch.equal(access.rows(0, 21, 2), torch.from_numpy(recorded.rows_TMHK[21, 2]))
    other = [np.array_equal(access.rows(3, 0, 0), rows) for rows in recorded.rows_TMHK[:, 0]]
    assert sum(other) == 1 and not other[20]


def test_larger_tables_split_rows_and_smaller_ones_merge_them():
    recorded = trace()
    wanted = torch.from_numpy(recorded.rows_TMHK[20, 0])
    assert torch.equal(RecordedAccess(recorded, 4096).rows(0, 0, 0) // 4, wanted)
    wide = torch.stack([RecordedAccess(recorded, 4096).rows(0, i, 0) for i in range(40)])
    assert torch.bincount((wide % 4).flatten()).min() > wide.numel() / 5
    assert torch.equal(RecordedAccess(recorded, 256).rows(0, 0, 0), wanted // 4)


def test_zipf_access_has_the_shares_of_zipf_s_law():
    access = DrawnAccess(1024, (100, 100), is_zipf=True)
    counts = torch.bincount(access.rows(0, 0, 0).flatten(), minlength=1024).sort(descending=True)
    harmonic = (1 / torch.arange(1, 1025)).sum()
    shares = counts.values[:2] / 10_000 * harmonic
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.5]), rtol=0.15, atol=0)
    evenly = DrawnAccess(1024, (100, 100), is_zipf=False).rows(0, 0, 0)
    assert torch.bincount(evenly.flatten(), minlength=1024).max() < 40


class HintRecorder(DeviceTable):
    def hint(self, rows, layer=0):
        self.hinted = rows, layer


def test_a_replayed_table_reads_the_rows_of_the_access_pattern():
    table = HintRecorder(torch.randn(1024, 4))
    access = RecordedAccess(trace(), 1024)
    replay = Replay((2, 5), access, recall=0.5, candidates=1.5)
    replayed = ReplayedTable(table, replay)
    replay.begin(7)
    asked, weights = torch.zeros(2, 4, 32, dtype=torch.int64), torch.rand(2, 4, 32)
    for position in range(7, 10):
        replay.prepare(range(2))
        for memory, layer in enumerate((2, 5)):
            rows = torch.stack([access.rows(one, position, memory) for one in (0, 1)])
            replayed.hint(asked, layer)
            hinted, hinted_layer = table.hinted
            assert hinted_layer == layer and hinted.numel() == 2 * 4 * 48
            # every sequence has different wrong predictions
            assert len(hinted.unique()) > 0.6 * hinted.numel()
            assert 0.4 < torch.isin(rows, hinted).float().mean() < 0.8
            found = replayed.start(asked, weights, layer).finish()
            torch.testing.assert_close(found, table.start(rows, weights).finish())


def test_peer_predicts_for_both_tables_then_hints_the_rows_it_reads_next():
    down, values = (HintRecorder(torch.randn(1024, 4)) for _ in range(2))
    access = RecordedAccess(trace(), 1024)
    replay = Replay((2,), access, recall=0.0, candidates=2.0, peer_layers=[2])
    tables = [ReplayedTable(table, replay) for table in (down, values)]
    replay.begin(7)
    replay.prepare([0])
    rows = access.rows(0, 7, 0)
    for table, replayed in zip((down, values), tables, strict=True):
        replayed.hint(torch.zeros(1, 4, 64, dtype=torch.int64), 2)
        assert table.hinted[0].numel() == 2 * rows.numel()
        # recall 0 means that every predicted row is wrong but for chance
        assert torch.isin(table.hinted[0], rows).float().mean() < 0.4
    tables[1].hint(torch.zeros(1, 4, 32, dtype=torch.int64), 2)
    assert torch.equal(values.hinted[0], rows[None])
    x = torch.randn(1, 4)
    dots = tables[0].start_dots(torch.zeros(1, 4, 32, dtype=torch.int64), x, 2).finish()
    torch.testing.assert_close(dots, down.start_dots(rows[None], x).finish())
    found = tables[1].start(torch.zeros(1, 4, 32, dtype=torch.int64), dots, 2).finish()
    torch.testing.assert_close(found, values.start(rows[None], dots).finish())


def test_a_prompt_is_replayed_token_by_token_however_it_is_split():
    table = DeviceTable(torch.randn(1024, 4))
    access = RecordedAccess(trace(), 1024)
    replay = Replay((2, 5), access)
    replayed = ReplayedTable(table, replay)
    replay.begin(3)
    replay.prepare([1], 6)
    weights = torch.rand(6, 4, 32)
    places = [(part, memory) for part in (slice(0, 2), slice(2, 6)) for memory in (0, 1)]
    for part, memory in places:
        rows = torch.stack([access.rows(1, 3 + i, memory) for i in range(part.start, part.stop)])
        found = replayed.start(torch.zeros_like(rows), weights[part], (2, 5)[memory]).finish()
        torch.testing.assert_close(found, table.start(rows, weights[part]).finish())
    # a step that is not prepared reads the first token's rows for all tokens
    replay.begin(9)
    rows = access.rows(0, 9, 1).expand(3, 4, 32)
    found = replayed.start(torch.zeros(3, 4, 32, dtype=torch.int64), weights[:3], 5).finish()
    torch.testing.assert_close(found, table.start(rows.contiguous(), weights[:3]).finish())
    replay.prepare([1], 2)
    with pytest.raises(ValueError, match="3 tokens requested, 2 prepared"):
        replayed.start(torch.zeros(3, 4, 32, dtype=torch.int64), weights[:3], 5)


def test_an_error_in_a_fetcher_callback_is_saved():
    replay = Replay((0,), RecordedAccess(trace(), 1024))
    table = ReplayedTable(DeviceTable(torch.randn(1024, 4)), replay)
    source = table.row_source(0)
    assert table.fetched_capacity is None and source.rows is table.table.rows
    start = START(RowFetcher.from_address(source.fetcher_address).start)
    rows, slots = torch.zeros(2, 128, dtype=torch.int64), torch.zeros(2, 128, dtype=torch.int64)
    assert start(None, rows.data_ptr(), 1, 128, 1, 0, slots.data_ptr()) == 1
    wanted = replay.access.rows(0, 0, 0).flatten()
    assert torch.equal(slots[0], wanted) and not slots[1].any()
    assert start(None, rows.data_ptr(), 1, 64, 1, 0, slots.data_ptr()) == 0
    assert "128 rows a token, not 64" in str(replay.error)


def test_warm_up_rows_differ_from_timed_rows():
    access = RecordedAccess(trace(), 1024)
    timed = {tuple(access.rows(0, i, 0).flatten().tolist()) for i in range(40)}
    warm = {tuple(access.rows(0, i, 0, warm_up=True).flatten().tolist()) for i in range(40)}
    assert len(timed) == len(warm) == 20 and not timed & warm


def test_invalid_loads_are_rejected():
    for field, value in (
        ("rows", (2**13,)),
        ("rows", (3000,)),
        ("batches", (0,)),
        ("prompt_lens", (0,)),
        ("rows", (-1,)),
        ("batches", (65,)),
        ("cache_shares", (0.1, 0.0)),
        ("recall", 1.5),
        ("lookahead", -1),
        ("rounds", 0),
        ("candidates", 0.0),
    ):
        with pytest.raises(ConfigError, match=f"{field}: "):
            MemoryLoad(**{field: value})
    for field, value in (("cold", True), ("lookahead", 1)):
        with pytest.raises(ConfigError, match=f"{field}: needs the disk tier"):
            MemoryLoad(tiers=("device", "mmap"), **{field: value})
    for field in ("recall", "candidates"):
        with pytest.raises(ConfigError, match=f"{field}: needs a lookahead"):
            MemoryLoad(**{field: 0.5})
    assert MemoryLoad(lookahead=1, candidates=2.0).prediction == (0.5, 2.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows_TMHK": np.zeros((40, 2, 4, 32), dtype=np.int64)}, "not \\(3, 4, 32\\)"),
        ({"counts_MR": np.zeros((3, 256), dtype=np.int64)}, "rows outside its 256 rows"),
        ({"rows_TMHK": np.zeros((1, 3, 4, 32), dtype=np.int64)}, "fewer than 2 tokens"),
        ({"counts_MR": np.zeros((3, 1025), dtype=np.int64)}, "nor a divisor of the 1025 rows"),
    ],
)
def test_traces_of_other_models_are_rejected(tmp_path, change, said):
    replace(trace(), **change).save(tmp_path / "trace.npz")
    source = save_model(random_model(tiny_config(num_layers=8)), tmp_path / "model")
    with pytest.raises((ConfigError, DataError), match=said):
        measure(source, MemoryLoad(), tmp_path / "trace.npz", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_trace_for_tables_of_two_to_the_n_rows_has_such_a_number_itself(tmp_path):
    replace(trace(), counts_MR=np.zeros((3, 1025), dtype=np.int64)).save(tmp_path / "trace.npz")
    with pytest.raises(DataError, match="1025 rows are not a power of two"):
        checked_trace(tmp_path / "trace.npz", (3, 4, 32))


@pytest.mark.parametrize(
    ("tier", "lookahead", "has_tables"), [("mmap", 0, False), ("disk", 2, True), ("disk", 0, True)]
)
def test_no_limits_are_measured_for_a_point_without_a_plan(tier, lookahead, has_tables):
    measured = []
    point = Point(64, tier, "float32", 1, "zipf", 0, "unused", False, lookahead, None, None)
    reader = SimpleNamespace(disk_tables=["table"] if has_tables else [])
    # the disk was not measured: there is no io_uring
    done = Round(tokens_per_s=1.0, seconds=1.0, hit_rate=None)
    assert planned_tokens_per_s(done, reader, point, lambda: measured.append(1), None) is None
    assert not measured


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
@pytest.mark.slow
def test_the_sweep_is_measured_saved_and_plotted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(disk_meter, "_MOST_READS", 500)
    source = save_model(random_model(tiny_config(num_layers=8, head_dim=16)), tmp_path / "model")
    trace().save(tmp_path / "trace.npz")
    out, file = tmp_path / "out", tmp_path / "memory.json"
    arguments = [
        *("bench", "memory", "--model", str(source), "--out", str(out), "--json", str(file)),
        *("--rows", "1024", "4096", "--batches", "1", "2"),
        *("--prompt-lens", "70"),
        *("--skews", "recorded", "zipf", "--row-dtypes", "int8"),
        *("--lookahead", "1", "--cache-shares", "0.5", "--output-len", "2"),
        *("--trace", str(tmp_path / "trace.npz"), "--rounds"),
    ]
    every_tier = "1", "--tiers", "device", "disk", "mmap"
    assert main([*arguments, *every_tier]) == 0
    results = json.loads(file.read_text())
    assert len(results) == 2 * 3 * 3 * 2
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 + len(results)
    assert "no memory layers; measured with 3 Memory+ layers of 4 heads x 32 rows" in printed[0]
    assert printed[1] == f"rows read: recorded, zipf; trace {tmp_path / 'trace.npz'}"
    assert all(" drawn " in line for line in printed[3:])
    for result in results:
        is_disk = result["tier"] == "disk"
        assert result["tokens_per_s"] > 0
        assert (result["hit_rate"] is None) == (result["tier"] == "mmap")
        assert (result["cache_bytes"] > 0) == is_disk
        is_planned = result["tier"] != "mmap" and not result["lookahead"]
        assert (result["planned_tokens_per_s"] is not None) == is_planned
        assert (result["planned_tokens_per_s"] or 1) > 0
        for name in ("stall_s", "reads_per_token", "limit_reads_per_s", "read_latency_s"):
            assert (result[name] is not None) == is_disk
        assert (result["lookahead"] > 0) == (is_disk and not result["prompt_len"])
        assert (result["batch"], result["prompt_len"]) in ((1, 0), (2, 0), (1, 70))
        assert result["page_cache"] == {"device": "unused", "disk": "excluded"}.get(
            result["tier"], "dropped"
        )
    assert (out / "memory.png").stat().st_size > 0
    kept = (out / "rounds.jsonl").read_text()
    assert main([*arguments, *every_tier]) == 0
    assert (out / "rounds.jsonl").read_text() == kept
    assert main([*arguments, "1", "--cold", "--tiers", "disk"]) == 0
    assert all(result["is_cold"] for result in json.loads(file.read_text()))
    # an incomplete round is repeated
    (out / "rounds.jsonl").write_text(kept[:-20])
    assert main([*arguments, *every_tier]) == 0
    assert len(json.loads(file.read_text())) == len(results)
    again = (out / "rounds.jsonl").read_text()
    assert main([*arguments, *every_tier]) == 0
    assert (out / "rounds.jsonl").read_text() == again
    assert main([*arguments, "1", "--prompt-lens", "512"]) == 2
    assert "--prompt-lens: 512 must be below 512" in capsys.readouterr().err
    assert main([*arguments, "1", "--output-len", "3"]) == 2
    assert "has rounds with another --output-len: 2" in capsys.readouterr().err
