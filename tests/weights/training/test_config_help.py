"""The list of training settings: complete, as the docs have it, and an example that is valid."""

import resource
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from engine.model.config import MemoryConfig, ModelConfig
from server.cli.main import main
from weights.checkpoints.config_json import MODEL_KEYS, parse_model
from weights.training.config_help import (
    all_settings,
    attribute_texts,
    describe_settings,
    example_config,
    settings_table,
)
from weights.training.new_model import model_config
from weights.training.train_config import DataConfig, OptimizerConfig, RunConfig, read_train_config

DOCS = Path(__file__).parents[3] / "docs" / "training.md"
SECTIONS = {
    "model.memory": MemoryConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
}
# keys whose default is in the code of parse_model -> our fields
DEFAULTS = {
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}


@pytest.mark.parametrize("section", ["model", *SECTIONS])
def test_the_docs_have_the_table_of_each_section(section):
    assert settings_table(section) in DOCS.read_text(), f"put it there:\n{settings_table(section)}"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_meaning(section):
    keys = [one.key for one in all_settings() if one.section == section]
    names = [field.name for field in fields(SECTIONS[section])]
    assert keys == (["layers", *names] if section == "model.memory" else names)
    assert list(attribute_texts(SECTIONS[section])) == names


def test_every_key_of_a_model_is_listed():
    listed = {one.key: one.default for one in all_settings() if one.section == "model"}
    assert {*listed, "vocab_size", "memory"} == MODEL_KEYS
    required = [key for key, default in listed.items() if default == "required"]
    model = parse_model({"vocab_size": 300} | dict.fromkeys(required, 4) | {"hidden_size": 8})
    assert isinstance(model, ModelConfig)
    for key, name in DEFAULTS.items():
        assert tomllib.loads(f"x = {listed[key]}")["x"] == getattr(model, name), key


def test_the_example_is_valid_and_has_every_key(tmp_path):
    text = example_config()
    (tmp_path / "train.toml").write_text(text)
    config = read_train_config(tmp_path / "train.toml")
    assert config == read_train_config(tmp_path / "train.toml", ["optimizer.lr=1e-3"])
    assert model_config(config.model, config.data.vocab_size).memory.num_rows == 65536
    assert all(f"{one.key} = " in text or f"# {one.key}: " in text for one in all_settings())


def test_the_command_prints_the_list_and_writes_the_example(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help-config"])
    assert capsys.readouterr().out == f"{describe_settings()}\n"
    assert "  warmup_steps (integer; default 100)" in describe_settings()
    for status in (0, 2):
        with pytest.raises(SystemExit, match=str(status)):
            main(["train", "--write-example", str(tmp_path / "new.toml")])
    assert (tmp_path / "new.toml").read_text() == example_config()
    assert "new.toml: File exists" in capsys.readouterr().err


def test_an_example_that_does_not_fit_on_the_disk_leaves_no_file(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--write-example", str(tmp_path / "new.toml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "new.toml: File too large" in capsys.readouterr().err
    assert not (tmp_path / "new.toml").exists()
