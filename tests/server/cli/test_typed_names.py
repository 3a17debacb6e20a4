"""Errors name what the user typed: options, positional arguments, keys of a file."""

import pytest

from server.cli.config_file import apply_config
from server.cli.main import main
from server.cli.options import Parser, add_options
from server.cli.typed_names import in_typed_names, typed_names
from server.model_options import ModelOptions

NAMES = {
    "table_cache": "--table-cache",
    "model": "--model",
    "max_num_seqs": "s.toml: max_num_seqs",
    "texts": "TEXTS",
}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("table_cache: 1KiB is too small", "--table-cache: 1KiB is too small"),
        ("texts: none given", "TEXTS: none given"),
        ("max_num_seqs: 0 is too few", "s.toml: max_num_seqs: 0 is too few"),
        # a word without an underscore is a field only before the first colon
        ("model: this model has none", "--model: this model has none"),
        ("file: increase table_cache.", "file: increase --table-cache."),
        ("4 is less than max_num_seqs 64", "4 is less than max_num_seqs 64"),
        # other names, paths and what was given stay
        ("table_caches: x", "table_caches: x"),
        ("optimizer.table_cache: x", "optimizer.table_cache: x"),
        (
            "json: /tmp/table_cache/x and 'table_cache'",
            "json: /tmp/table_cache/x and 'table_cache'",
        ),
        ("/tmp/table_cache: is a folder", "/tmp/table_cache: is a folder"),
    ],
)
def test_fields_become_what_was_typed(message, said):
    assert in_typed_names(message, NAMES) == said


def test_names_are_those_of_the_verb_and_of_its_file(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('[model]\ntable-cache = "1GiB"\ndtype = "bfloat16"\n')
    parser = Parser()
    verb = parser.add_subparsers().add_parser("serve")
    verb.add_argument("texts", metavar="TEXTS")
    add_options(verb, ModelOptions)
    options = parser.parse_args(["serve", "a.txt", "--dtype", "float32"])
    assert typed_names(options)["table_cache"] == "--table-cache"
    apply_config(file, options, [ModelOptions])
    names = typed_names(options)
    assert names["table_cache"] == f"{file}: table-cache"
    # the command line replaced this key
    assert (names["dtype"], names["texts"]) == ("--dtype", "TEXTS")
    assert names["verify_tables"] == "--verify-tables"


def test_a_verb_prints_them(capsys):
    assert main(["generate", "hi", "--table-tier", "device", "--table-cache", "1GiB"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "memplus: --table-cache: needs --table-tier host, disk or auto, not device"
