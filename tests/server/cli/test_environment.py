"""Options from environment variables: names, types, precedence, and refusals."""

import argparse
import re
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.access import AccessOptions
from server.cli.config_file import apply_config
from server.cli.environment import apply_environment
from server.cli.main import _SERVED, main
from server.cli.options import Parser, add_options, from_options, option_fields
from server.cli.typed_names import in_typed_names, typed_names
from server.config import HttpOptions, environment_settings
from server.model_options import ModelOptions


@pytest.fixture(scope="module")
def parser() -> Parser:
    made = Parser()
    made.add_argument("--config", type=Path)
    for kind in _SERVED:
        add_options(made, kind)
    return made


def applied(parser: Parser, variables: dict[str, str], *arguments: str) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    apply_environment(variables, options, _SERVED)
    return options


def test_variables_have_the_types_of_their_options(parser):
    given = applied(
        parser,
        {
            "MEMPLUS_MODEL": "some",
            "MEMPLUS_VERIFY_TABLES": "on",
            "MEMPLUS_PORT": "9",
            "MEMPLUS_UI": "false",
            "MEMPLUS_KV_CACHE_GIB": "2",
            "MEMPLUS_MAX_MODEL_LEN": "99",
            "MEMPLUS_CORS_ORIGIN": "http://a.org, http://b.org",
            "MEMPLUS_CONFIG": "serve.toml",
        },
    )
    model = ModelOptions(model="some", verify_tables=True)
    assert from_options(ModelOptions, given) == model
    assert from_options(HttpOptions, given) == HttpOptions(port=9, ui=False)
    assert from_options(EngineConfig, given) == EngineConfig(kv_cache_gib=2.0, max_model_len=99)
    access = AccessOptions(cors_origin=("http://a.org", "http://b.org"))
    assert from_options(AccessOptions, given) == access
    assert given.config == Path("serve.toml")


def test_every_option_but_api_key_has_a_variable(parser):
    for name, (field, kind) in option_fields(_SERVED).items():
        if name == "api_key":
            continue
        text = (field.metadata.get("choices") or ["1"])[0]
        assert hasattr(applied(parser, {f"MEMPLUS_{name.upper()}": text}), name), kind


def test_the_command_line_wins_over_variables_and_these_over_the_file(parser, tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nhost = "file"\nserved-model-name = "file"')
    variables = {"MEMPLUS_PORT": "2", "MEMPLUS_HOST": "variable", "MEMPLUS_CONFIG": "other.toml"}
    given = applied(parser, variables, "--port", "3", "--config", str(file))
    assert given.config == file
    apply_config(file, given, _SERVED)
    expected = HttpOptions(port=3, host="variable", served_model_name="file")
    assert from_options(HttpOptions, given) == expected


@pytest.mark.parametrize(
    ("variable", "text", "named"),
    [
        ("MEMPLUS_PROT", "1", "MEMPLUS_PROT: unknown environment variable; did you mean MEMPLUS_P"),
        ("MEMPLUS_API_KEY", "secret", "did you mean MEMPLUS_API_KEYS?"),
        ("MEMPLUS_port", "1", "MEMPLUS_port: unknown"),
        ("MEMPLUS_PORT", "80.5", "MEMPLUS_PORT: expected int, got '80.5'"),
        ("MEMPLUS_UI", "maybe", "MEMPLUS_UI: expected bool, got 'maybe'"),
        ("MEMPLUS_KV_CACHE_GIB", "nan", "MEMPLUS_KV_CACHE_GIB: must be finite"),
        ("MEMPLUS_DTYPE", "int3", "MEMPLUS_DTYPE: 'int3' is not one of"),
        ("MEMPLUS_PORT", "tcp://10.0.0.1:8000", "set enableServiceLinks to false"),
        ("MEMPLUS_SERVICE_HOST", "10.0.0.1", "set enableServiceLinks to false"),
        ("MEMPLUS_PORT_8000_TCP_ADDR", "10.0.0.1", "set enableServiceLinks to false"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(parser, variable, text, named):
    with pytest.raises(ConfigError, match=re.escape(named)) as refusal:
        applied(parser, {variable: text})
    assert "secret" not in str(refusal.value)


def test_an_error_of_a_value_names_the_variable(parser):
    given = applied(parser, {"MEMPLUS_MAX_BODY_MIB": "0"})
    with pytest.raises(ConfigError) as refusal:
        from_options(HttpOptions, given)
    line = in_typed_names(str(refusal.value), typed_names(given))
    assert line == "MEMPLUS_MAX_BODY_MIB: must be at least 1, not 0"


def test_serve_reads_the_environment_without_empty_variables(monkeypatch, capsys):
    monkeypatch.setenv("MEMPLUS_HOST", "")
    monkeypatch.setenv("MEMPLUS_PROT", "1")
    given = environment_settings()
    assert "MEMPLUS_HOST" not in given
    assert given["MEMPLUS_PROT"] == "1"
    assert main(["serve"]) == 2
    assert "MEMPLUS_PROT: unknown environment variable" in capsys.readouterr().err
