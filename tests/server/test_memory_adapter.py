"""``--memory-adapter``: a base and its adapter are served, evaluated and merged as one model."""

import pytest

from server.cli.main import main
from tests.memory_adapters import IDS, grown_model
from tests.models import plain_greedy
from tests.server.running import running
from weights.checkpoints.checkpoint import load_model, open_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return grown_model(folder), folder


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMPLUS_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_server_answers_as_the_grown_model(made, tmp_path):
    grown, folder = made
    with running(folder / "base", "--memory-adapter", str(folder / "adapter")) as server:
        options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = server.complete(prompt=IDS, **options).json()
        models = server.http.get("/v1/models").json()
    assert [one["id"] for one in models["data"]] == ["base"]
    assert answer["choices"][0]["token_ids"] == plain_greedy(grown, IDS, 8)


def test_a_base_and_its_adapter_become_a_folder(made, tmp_path, capsys):
    grown, folder = made
    base, adapter = str(folder / "base"), str(folder / "adapter")
    assert main(["convert", base, str(tmp_path / "out"), "--memory-adapter", adapter]) == 0
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    loaded, config = load_model(tmp_path / "out")
    assert config.model == grown.config
    assert plain_greedy(loaded, IDS, 4) == plain_greedy(grown, IDS, 4)


def test_another_base_is_one_line(made, tmp_path, capsys):
    _, folder = made
    grown, adapter = str(folder / "grown"), str(folder / "adapter")
    assert main(["generate", "a", "--model", grown, "--memory-adapter", adapter]) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [one for one in lines if one.startswith("memplus: ")]
    assert line.startswith("memplus: --memory-adapter: ")
    assert line.endswith("has memory layers already")
    assert len(open_checkpoint(folder / "grown")[0].model.memory_layers) == 2
