"""``memplus bench gpu``: the contents of its report; no assertion on speed."""

import itertools
import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks import gpu_lookups
from server.cli.main import main

SMALL = ["--num-subkeys", "128", "--width", "64", "--rounds", "1"]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu_is_rejected(capsys):
    assert main(["bench", "gpu", *SMALL]) != 0
    assert "bench gpu: torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache-share", "0"], "cache_share: 0.0 is not in"),
        (["--num-heads", "2"], "has (3, 4, 32) layers, heads and rows per head, not (3, 2, 32)"),
        (["--num-subkeys", "100"], "num_subkeys: 100 is not a power of two"),
        (["--json", "nowhere/file"], "json: folder nowhere does not exist"),
    ],
)
def test_an_invalid_option_is_named_in_the_error(monkeypatch, capsys, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "gpu", *SMALL, *options]) != 0
    assert message in capsys.readouterr().err


def test_a_short_trace_is_rejected(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_lookups, "TOKENS", (1, 2000))
    assert main(["bench", "gpu", *SMALL]) != 0
    assert "has fewer than 8000 tokens" in capsys.readouterr().err


@given(st.integers(2, 3000), st.integers(1, 300), st.integers(2, 12), st.integers(1, 200))
def test_no_trace_position_is_read_twice(num_positions, tokens, replays, steps):
    pytest.importorskip("triton")
    from benchmarks.gpu_tiers import timed_positions

    assume(num_positions >= 2 * tokens)
    positions = timed_positions(num_positions, tokens, replays, steps)
    assert 2 <= len(positions) <= replays
    assert all(1 <= len(replay) <= steps for replay in positions)
    assert {len(step) for replay in positions for step in replay} == {tokens}
    flat = [position for replay in positions for step in replay for position in step]
    assert len(set(flat)) == len(flat) and min(flat) >= 0 and max(flat) < num_positions


@pytest.mark.gpu
@on_gpu
def test_a_cache_too_small_for_any_row_is_rejected(capsys):
    assert main(["bench", "gpu", *SMALL]) != 0
    assert "cache_share: table_cache: " in capsys.readouterr().err


@pytest.mark.gpu
@on_gpu
def test_every_tier_skew_and_dtype_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_lookups, "TOKENS", (1, 3))
    file = tmp_path / "out.json"
    share = ["--cache-share", "1", "--num-subkeys", "512"]
    assert main(["bench", "gpu", *SMALL, *share, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    gathers = {
        (one["tier"], one["skew"], one["dtype"], one["tokens"])
        for one in found
        if one["op"] == "gather" and one["backend"] == "triton"
    }
    tiers, dtypes = ("device", "host", "cached"), gpu_lookups.DTYPES
    assert gathers == set(itertools.product(tiers, gpu_lookups.SKEWS, dtypes, (1, 3)))
    assert all((one["hit_rate"] is None) == (one["tier"] != "cached") for one in found)
    assert all(one["us"] > 0 for one in found)
