"""The benchmark beside busy processes: what it runs, how often, and beside whom."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import busy_machine
from benchmarks.busy_machine import NEIGHBOURS, POLICIES
from server.cli.main import main


@pytest.fixture
def runs(monkeypatch):
    """Records the commands in run order, each with the number of busy loops."""
    ran, loops, start = [], [], subprocess.Popen

    def counted(command):
        loops.append(start(command))
        return loops[-1]

    def fake(environment, *arguments):
        busy = sum(loop.poll() is None for loop in loops)
        ran.append((arguments[:2] == ("bench", "offline"), environment, busy))
        if ran[-1][0]:
            result = {"phase": "decode", "batch": 8, "tokens_per_s": float(len(ran))}
            Path(arguments[-1]).write_text(json.dumps([result]))
        else:
            assert Path(arguments[1]).exists()
            Path(arguments[-1]).mkdir()
            records = ({"kind": "step", "tokens_per_s": speed} for speed in (1, 2, 50, 60, 70))
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (Path(arguments[-1]) / "log.jsonl").write_text(lines)

    monkeypatch.setattr(busy_machine.subprocess, "Popen", counted)
    monkeypatch.setattr(busy_machine, "_memplus", fake)
    yield ran
    assert all(loop.poll() is not None for loop in loops)


def test_policies_take_turns_beside_each_number_of_busy_loops(runs, tmp_path, capsys):
    file = tmp_path / "busy.json"
    assert main(["bench", "busy", "--rounds", "2", "--json", str(file)]) == 0
    assert runs == [
        (is_offline, environment, busy)
        for busy in NEIGHBOURS
        for is_offline in (True, False)
        for _ in range(2)
        for environment in POLICIES.values()
    ]
    results = json.loads(file.read_text())
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(results)
    # the median of rounds 1 and 4, and of steps after the first two
    assert results[0] == {
        **{"work": "decode 8", "neighbours": 0, "policy": "default"},
        "tokens_per_s": (1 + 1 + len(POLICIES)) / 2,
    }
    assert {one["tokens_per_s"] for one in results if one["work"] == "training"} == {60}


def test_what_cannot_be_measured_is_refused(runs, capsys):
    assert main(["bench", "busy", "--rounds", "0"]) == 2
    assert "rounds: must be at least 1" in capsys.readouterr().err
    assert not runs
