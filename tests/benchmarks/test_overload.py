"""``memplus bench overload`` against a real server: it refuses some requests and loses none."""

import json

import pytest

from server.cli.main import main

SHORT = ("--input-len", "9", "--output-len", "100", "--window-s", "1", "--ramp-s", "0.5")
# a slow machine fills it too
FEW = ("--max-queued-requests", "1")


@pytest.mark.slow
def test_an_overloaded_server_refuses_and_loses_nothing(memory_plus_folder, tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["--model", str(memory_plus_folder), "--factor", "12", *SHORT, *FEW]
    # the bars hold on a quiet machine only
    code = main(["bench", "overload", *arguments, "--json", str(file)])
    printed = capsys.readouterr().out
    assert code == int("missed" in printed)
    result = json.loads(file.read_text())
    assert result["lost"] == {} and result["completed"] > 0
    assert min(result["throughput"], *result["capacity"]) > 0
    assert result["num_refused"] > 0 and f"{result['num_refused']}, median" in printed
