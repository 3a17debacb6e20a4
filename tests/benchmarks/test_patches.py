"""``memplus bench patches``: lines for steps and loads, and refused numbers."""

import json

import pytest

from server.cli.main import main

SIZES = ["--own-rows", "200", "--many", "5", "--many-rows", "20", "--loaded-rows", "100"]


@pytest.mark.slow
def test_steps_and_loads_are_reported(memory_plus_folder, tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--model", str(memory_plus_folder), "--dtype", "float32", "--batches", "1", "3"]
    options += ["--tokens", "9", "--rounds", "2", *SIZES, "--json", str(file)]
    assert main(["bench", "patches", *options]) == 0
    results = json.loads(file.read_text())
    steps, loading = results["steps"], results["loading"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(steps) + 1
    assert [(one["batch"], one["num_loaded"]) for one in steps] == [(1, 1), (3, 3), (1, 5), (3, 5)]
    for one in steps:
        assert min(one["step_ms"], one["other_step_ms"]) > 0 and one["overhead"] > -1
        assert 0 < one["hit_share"] <= 1
    assert len(loading["load_ms"]) == 2 and loading["patch_rows"] == 100
    assert loading["longest_ms"] >= loading["step_ms"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1", "0"], "batches: must be at least 1, not 0"),
        (["--tokens", "2"], "tokens: must be at least 3, not 2"),
        (["--own-rows", "0"], "own_rows: must be at least 1, not 0"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_is_loaded(options, message, capsys):
    assert main(["bench", "patches", "--model", "no-such-model", *options]) == 2
    assert message in capsys.readouterr().err
