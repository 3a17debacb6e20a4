"""Options from a TOML file: names, types, groups, and the command line's precedence."""

import argparse

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.access import AccessOptions
from server.cli.config_file import apply_config
from server.cli.options import Parser, add_options, from_options
from server.config import HttpOptions
from server.model_options import ModelOptions

KINDS = (ModelOptions, EngineConfig, HttpOptions, AccessOptions)


@pytest.fixture
def read(tmp_path):
    def options(text: str, *arguments: str) -> argparse.Namespace:
        file = tmp_path / "serve.toml"
        file.write_text(text)
        parser = Parser()
        for kind in KINDS:
            add_options(parser, kind)
        given = parser.parse_args(arguments)
        apply_config(file, given, KINDS)
        return given

    return options


TEXT = """
port = 8080
api-key = ["one", "two"]
[model]
model = "some"
table_cache = "1GiB"
verify-tables = true
[engine]
kv-cache-gib = 2
[access]
cors_origin = "https://example.org"
"""


def test_keys_may_have_dashes_or_underscores_and_stand_in_tables(read):
    given = read(TEXT)
    model = ModelOptions(model="some", table_cache="1GiB", verify_tables=True)
    assert from_options(ModelOptions, given) == model
    assert from_options(EngineConfig, given) == EngineConfig(kv_cache_gib=2.0)
    assert from_options(HttpOptions, given) == HttpOptions(port=8080)
    access = AccessOptions(api_key=("one", "two"), cors_origin=("https://example.org",))
    assert from_options(AccessOptions, given) == access


def test_the_command_line_wins(read):
    given = read(TEXT, "--port", "9", "--no-verify-tables", "--api-key", "three")
    assert from_options(HttpOptions, given).port == 9
    assert not from_options(ModelOptions, given).verify_tables
    assert from_options(AccessOptions, given).api_key == ("three",)
    assert from_options(EngineConfig, given).kv_cache_gib == 2.0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot = 80", "prot: unknown option"),
        ("[http]\nprot = 80", "prot: unknown option"),
        ("[web]\nport = 80", "web: unknown table"),
        ("[http.more]\nport = 80", "more: unknown option"),
        ("port = '80'", "port: expected int, got '80'"),
        ("port = true", "port: expected int, got True"),
        ("port = 80.5", "port: expected int, got 80.5"),
        ("kv-cache-gib = nan", "kv-cache-gib: must be finite"),
        ("verify-tables = 1", "verify-tables: expected bool"),
        ("model = 7", "model: expected str"),
        ("dtype = 'int3'", "dtype: 'int3' is not one of"),
        ("api-key = [123456]", "api-key: expected a list of strings"),
        ("drain-timeout-s = 1\ndrain_timeout_s = 2", "drain_timeout_s: is given twice"),
        ("port = 80\n[http]\nport = 81", "port: is given twice"),
        ("port", "not a TOML file"),
        ("port = 1\nport = 2", "not a TOML file"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(read, tmp_path, text, named):
    with pytest.raises(ConfigError) as raised:
        read(text)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/serve.toml: ") and named in message
    assert "\n" not in message and "123456" not in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none.toml: No such file"):
        apply_config(tmp_path / "none.toml", argparse.Namespace(), KINDS)
