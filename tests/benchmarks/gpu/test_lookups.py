"""``memplus bench gpu``: its options, and the names of part lookups; no assertion on speed."""

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.gpu import lookups, run
from server.cli.main import main

SMALL = ["--num-subkeys", "128", "--width", "64", "--rounds", "1"]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def bench(out, *options):
    return main(["bench", "gpu", "--part", "lookups", "--out", str(out), *SMALL, *options])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu_is_rejected(capsys, tmp_path):
    assert bench(tmp_path) == 2
    assert capsys.readouterr().err == "memplus: bench gpu: torch finds no CUDA device\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache-share", "0"], "--cache-share: 0.0 is not in"),
        (
            ["--num-heads", "2"],
            "has (3, 4, 32) memory layers, heads and rows per head, not (3, 2, 32)",
        ),
        (["--num-subkeys", "100"], "--num-subkeys: 100 is not a power of two"),
    ],
)
def test_an_invalid_option_is_named_in_the_error(monkeypatch, capsys, tmp_path, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: object())
    assert bench(tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_a_short_trace_is_rejected(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(lookups, "TOKENS", (1, 2000))
    assert bench(tmp_path) == 2
    assert "has fewer than 8000 tokens" in capsys.readouterr().err


@given(st.integers(2, 3000), st.integers(1, 300), st.integers(2, 12), st.integers(1, 200))
def test_no_trace_position_is_read_twice(num_positions, tokens, replays, steps):
    pytest.importorskip("triton")
    from benchmarks.gpu.lookup_tiers import timed_positions

    assume(num_positions >= 2 * tokens)
    positions = timed_positions(num_positions, tokens, replays, steps)
    assert 2 <= len(positions) <= replays
    assert all(1 <= len(replay) <= steps for replay in positions)
    assert {len(step) for replay in positions for step in replay} == {tokens}
    flat = [position for replay in positions for step in replay for position in step]
    assert len(set(flat)) == len(flat) and min(flat) >= 0 and max(flat) < num_positions


@pytest.mark.gpu
@on_gpu
def test_a_cache_too_small_for_any_row_is_a_failure(capsys, tmp_path):
    assert bench(tmp_path, "--cache-share", "0.001") == 1
    assert "cache_share: table_cache: " in (tmp_path / "lookups.jsonl").read_text()


@pytest.mark.gpu
@on_gpu
def test_every_tier_skew_and_format_is_reported(tmp_path):
    share = ["--cache-share", "1", "--num-subkeys", "512"]
    assert bench(tmp_path, *share) == 0
    found = [json.loads(line) for line in (tmp_path / "lookups.jsonl").read_text().splitlines()]
    for dtype in lookups.DTYPES:
        for skew in lookups.SKEWS:
            of_kind = [one["name"] for one in found if f"{skew} {dtype} " in one["name"]]
            # three tiers and a hit rate, and torch's way to read plain rows
            assert len(of_kind) == len(lookups.TOKENS) * (5 if dtype == "bf16" else 4)
    assert all(one["value"] > 0 for one in found if "hit rate" not in one["name"])
