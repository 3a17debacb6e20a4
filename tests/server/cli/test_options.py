"""Options derived from dataclasses: groups, units, defaults, and help that fits three screens."""

import argparse
import re
from dataclasses import dataclass, field, fields

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.sampling.params import SamplingParams
from server.access import AccessOptions
from server.cli.main import main
from server.cli.options import Parser, add_options, from_options
from server.config import HttpOptions, SupervisionOptions, ThreadOptions
from server.limits import LimitOptions
from server.model_options import ModelOptions
from server.monitoring import MonitoringOptions
from server.node_options import NodeOptions
from server.patch_options import PatchOptions
from server.version import VERSION

SERVED = (
    *(ModelOptions, NodeOptions, EngineConfig, PatchOptions, ThreadOptions, HttpOptions),
    *(LimitOptions, AccessOptions, MonitoringOptions, SupervisionOptions),
)
GROUPS = {
    title: (settings, example)
    for settings in (*SERVED, SamplingParams)
    for title, example in (f.metadata["group"] for f in fields(settings) if "group" in f.metadata)
}
SCREEN = 50


@pytest.fixture
def serve_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    return capsys.readouterr().out


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"memplus {VERSION}\n")


def test_help_fits_three_screens_and_each_group_half_of_one(serve_help):
    lines = serve_help.splitlines()
    assert len(lines) <= 3 * SCREEN
    assert max(map(len, lines)) <= 100
    assert max(group.count("\n") for group in serve_help.split("\n\n  --")) <= SCREEN // 2


def test_groups_have_titles_and_one_example_each(serve_help):
    groups = re.findall(r"^([\w ]+):\n  example: (.+)\n\n  --", serve_help, re.MULTILINE)
    served = (
        *("model", "value tables", "several machines", "engine", "row patch limits"),
        *("row patches", "threads", "HTTP", "limits", "access", "monitoring", "supervision"),
    )
    assert groups == [(title, GROUPS[title][1]) for title in served]


@pytest.mark.parametrize("title", GROUPS)
def test_examples_are_accepted_and_change_their_group(title):
    settings, example = GROUPS[title]
    parser = Parser()
    add_options(parser, settings)
    assert from_options(settings, parser.parse_args(example.split())) != settings()


@pytest.mark.parametrize(
    "option",
    [
        *("--model NAME|DIR", "--table-cache SIZE", "--table-lookahead LAYERS"),
        *("--table-lookahead-share FRACTION", "--max-num-seqs N", "--max-model-len TOKENS"),
        *("--max-batched-tokens TOKENS", "--kv-cache-gib GIB", "--threads N", "--host ADDRESS"),
        *("--port PORT", "--served-model-name NAME", "--max-body-mib MIB"),
        *("--body-timeout-s SECONDS", "--drain-timeout-s SECONDS", "--stall-timeout-s SECONDS"),
    ],
)
def test_values_are_named_by_their_unit(serve_help, option):
    assert f"  {option}" in serve_help


def test_every_option_shows_its_default_once(serve_help):
    shown = re.split(r"^  (--[\w-]+)", serve_help, flags=re.MULTILINE)[1:]
    help_of = {
        name: " ".join(text.split()) for name, text in zip(shown[::2], shown[1::2], strict=True)
    }
    served = [one for settings in SERVED for one in fields(settings)]
    assert list(help_of) == ["--config"] + [f"--{one.name.replace('_', '-')}" for one in served]
    for one in served:
        text = help_of[f"--{one.name.replace('_', '-')}"]
        assert text.count("(default: ") == 1, one.name
        if one.default not in (None, ()) and not isinstance(one.default, bool):
            assert f"(default: {one.default})" in text


@dataclass(frozen=True)
class Plain:
    """Settings without a group.

    More about them.
    """

    sizes: tuple[int, ...] = field(default=(1, 2), metadata={"help": "sizes"})
    is_fast: bool = field(default=True, metadata={"help": "be fast"})
    hidden: str = ""

    def __post_init__(self) -> None:
        if not self.sizes[0]:
            raise ConfigError("sizes: must not begin with 0")


@pytest.fixture
def plain():
    parser = argparse.ArgumentParser("plain")
    add_options(parser, Plain)
    return parser


def test_a_class_without_a_group_is_titled_by_its_docstring(plain):
    text = plain.format_help()
    assert "\nSettings without a group:\n  --sizes" in text
    assert "(default: 1 2)" in text and "(default: on)" in text and "hidden" not in text


def test_settings_take_given_values_and_keep_other_defaults(plain):
    assert from_options(Plain, plain.parse_args([])) == Plain()
    given = plain.parse_args(["--sizes", "3", "4", "--no-is-fast"])
    assert from_options(Plain, given) == Plain((3, 4), False)
    with pytest.raises(ConfigError, match="sizes: must not begin"):
        from_options(Plain, plain.parse_args(["--sizes", "0"]))


def test_a_verb_may_take_some_fields_only():
    parser = Parser(prog="some")
    add_options(parser, ModelOptions, only=("model", "device"))
    options = re.findall(r"^  (--[\w-]+)", parser.format_help(), re.MULTILINE)
    assert options == ["--model", "--device"] and "value tables" not in parser.format_help()
    given = from_options(ModelOptions, parser.parse_args(["--device", "cpu"]))
    assert given == ModelOptions(device="cpu")
