"""``memplus bench lookahead``: recall and precision per layer, distance and width."""

import json

import pytest

from benchmarks.lookahead import measure
from engine.errors import ConfigError
from server.cli.main import main
from tests.models import feed_forward_changes, random_model, save_model, tiny_config

KINDS = ("dense", "memory_plus", "dense", "pkm")


@pytest.fixture
def folder(tmp_path):
    return save_model(random_model(tiny_config(**feed_forward_changes(*KINDS))), tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("some words that are run over " * 4)
    return str(tmp_path / "text.txt")


def test_recall_is_reported_by_layer_distance_and_width(folder, text, tmp_path, capsys):
    file = tmp_path / "recall.json"
    arguments = ["bench", "lookahead", text, "--model", str(folder), "--tokens", "60"]
    assert main([*arguments, "--widths", "1", "9", "--json", str(file)]) == 0
    found = {(r["layer"], r["distance"], r["candidates"]): r for r in json.loads(file.read_text())}
    assert set(found) == {(1, d, k) for d in (1, 2) for k in (3, 8)} | {
        (3, d, k) for d in (1, 2, 3, 4) for k in (3, 8)
    }
    for (layer, distance, _), one in found.items():
        assert 0 < one["recall"] <= 1 and 0 < one["precision"] <= 1
        assert one["recall"] <= found[layer, distance, 8]["recall"]
    # with as many predicted as read rows, recall equals precision
    assert found[1, 1, 3]["recall"] == pytest.approx(found[1, 1, 3]["precision"])
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_invalid_inputs_are_rejected(folder, text, tmp_path):
    with pytest.raises(ConfigError, match="tokens: the texts have"):
        measure(folder, [text], 10**6, [1], None)
    with pytest.raises(ConfigError, match="tokens: must be at least 1, not 0"):
        measure(folder, [text], 0, [1], None)
    with pytest.raises(ConfigError, match=r"widths: must be above 0 and finite, not 0"):
        measure(folder, [text], 10, [1, 0], None)
    dense = save_model(random_model(tiny_config()), tmp_path / "dense")
    with pytest.raises(ConfigError, match="has no memory layers"):
        measure(dense, [text], 10, [1], None)
