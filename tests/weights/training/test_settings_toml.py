"""Settings written as TOML: the config that is read back is equal."""

import tomllib
from dataclasses import replace

import pytest

from weights.training.config_help import example_config
from weights.training.settings_toml import settings_toml, toml_value
from weights.training.train_config import read_train_config


@pytest.mark.parametrize("memory", [True, False])
def test_settings_are_read_back(config, tmp_path, memory):
    settings = config("optimizer.eps=1e-9", "run.freeze=['dense']", memory=memory)
    path = tmp_path / "again.toml"
    path.write_text("\n".join(settings_toml(settings)))
    assert read_train_config(path) == settings


def test_the_example_and_a_run_without_model_keys_are_read_back(tmp_path):
    path = tmp_path / "example.toml"
    path.write_text(example_config())
    for settings in (read_train_config(path), replace(read_train_config(path), model={})):
        path.write_text("\n".join(settings_toml(settings)))
        assert read_train_config(path) == settings


def test_every_mapping_with_keys_is_a_section(config, tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    model = {"rope_scaling": scaling, "a b": {"c.d": {"e": 1}}, "pruned_heads": {}, "f": 1}
    lines = settings_toml(replace(config(), model=model))
    for line in ("[model.rope_scaling]", '[model."a b"."c.d"]', "pruned_heads = {}"):
        assert line in lines
    assert tomllib.loads("\n".join(lines))["model"] == model


@pytest.mark.parametrize(
    "value",
    [
        *(True, 3, 1e-8, 1.0, [], ["a", "b"], {"1": "memory_plus"}, {"a b": {"c": [1, 2]}}),
        *('say "x"', "back\\slash", "tab\tline\n", "delete \x7f null \0", "Füchse 狐 😀"),
    ],
)
def test_values_are_read_back(value):
    assert tomllib.loads(f"value = {toml_value(value)}") == {"value": value}
