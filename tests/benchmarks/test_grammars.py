"""``memplus bench grammars``: a line per grammar and batch, and refused numbers."""

import json

import pytest

from server.cli.main import main


def test_every_grammar_and_batch_is_reported(memory_plus_folder, tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--model", str(memory_plus_folder), "--dtype", "float32", "--batches", "1", "3"]
    options += ["--tokens", "9", "--rounds", "2", "--json", str(file)]
    assert main(["bench", "grammars", *options]) == 0
    results = json.loads(file.read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(results) + 2
    given = [(result["grammar"], result["batch"]) for result in results]
    names = ("JSON schema", "regex", "counts")
    assert given == [(name, batch) for batch in (1, 3) for name in names]
    for result in results:
        assert min(result["plain_step_ms"], result["step_ms"]) > 0 and result["overhead"] > -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1", "0"], "batches: must be at least 1, not 0"),
        (["--tokens", "2"], "tokens: must be at least 3, not 2"),
        (["--rounds", "0"], "rounds: must be at least 1, not 0"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_is_loaded(options, message, capsys):
    assert main(["bench", "grammars", "--model", "no-such-model", *options]) == 2
    assert message in capsys.readouterr().err
