"""Options of several machines: ranges, the secret, and the settings that follow."""

import re

import pytest

from engine.errors import ConfigError
from server.cli.main import main
from server.config import environment_node_key
from server.node_options import NodeOptions

KEY = "0123456789abcdef"
TWO = {"nnodes": 2, "master_addr": "10.0.0.1"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"nnodes": 0}, "nnodes: 0 is outside"),
        ({"nnodes": 65}, "nnodes: 65 is outside"),
        ({"node_rank": 1}, "node_rank: needs --nnodes above 1"),
        ({"master_addr": "10.0.0.1"}, "master_addr: needs --nnodes above 1"),
        ({"master_port": 1}, "master_port: needs --nnodes above 1"),
        ({"node_key_file": "key"}, "node_key_file: needs --nnodes above 1"),
        ({"nnodes": 2}, "master_addr: --nnodes above 1 needs it"),
        (TWO | {"node_rank": 2}, "node_rank: 2 is outside [0, 1]"),
        (TWO | {"node_rank": -1}, "node_rank: -1 is outside [0, 1]"),
        (TWO | {"master_port": 0}, "master_port: 0 is outside"),
        (TWO | {"master_port": 65536}, "master_port: 65536 is outside"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, reason):
    with pytest.raises(ConfigError, match=f"^{re.escape(reason)}"):
        NodeOptions(**options)


def test_one_machine_has_no_settings():
    assert NodeOptions().settings(4, "") is None


def test_each_machine_has_an_equal_number_of_ranks():
    settings = NodeOptions(**TWO, node_rank=1, master_port=700).settings(6, KEY)
    assert (settings.ranks(0), settings.ranks(settings.node)) == (range(3), range(3, 6))
    assert (settings.address, settings.port, settings.key) == ("10.0.0.1", 700, KEY.encode())
    assert KEY not in repr(settings)
    for ranks in (1, 3):
        with pytest.raises(ConfigError, match=f"nnodes: 2 does not divide tensor_parallel {ranks}"):
            NodeOptions(**TWO).settings(ranks, KEY)


def test_the_secret_comes_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{KEY}-file\n")
    options = NodeOptions(**TWO, node_key_file=str(file))
    assert options.settings(2, "").key == f"{KEY}-file".encode()
    with pytest.raises(ConfigError, match="node_key_file: replaces MEMPLUS_NODE_KEY"):
        options.settings(2, KEY)


@pytest.mark.parametrize(
    ("content", "variable", "reason"),
    [
        (None, "", "node_key_file: machines need a secret"),
        (None, "short", "MEMPLUS_NODE_KEY: a node key must have 16 to 4096 bytes"),
        (b"short\n", "", "node_key_file: .*key: a node key must have 16 to 4096 bytes"),
        (b"x" * 5000, "", "node_key_file: .*key: a node key must have 16 to 4096 bytes"),
        ("missing", "", "node_key_file: .*missing: No such file"),
    ],
)
def test_a_secret_that_is_missing_or_too_short_is_refused(tmp_path, content, variable, reason):
    file = None
    if content is not None:
        file = tmp_path / ("missing" if content == "missing" else "key")
        if content != "missing":
            file.write_bytes(content)
    options = NodeOptions(**TWO, node_key_file=None if file is None else str(file))
    with pytest.raises(ConfigError, match=f"^{reason}") as refusal:
        options.settings(2, variable)
    assert "short" not in str(refusal.value)


def test_serve_reads_the_secret_of_the_environment(monkeypatch, capsys):
    words = ["serve", "--tensor-parallel", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"]
    monkeypatch.delenv("MEMPLUS_NODE_KEY", raising=False)
    assert (environment_node_key(), main(words)) == ("", 2)
    assert "memplus: --node-key-file: machines need a secret" in capsys.readouterr().err
    monkeypatch.setenv("MEMPLUS_NODE_KEY", "short")
    assert (environment_node_key(), main(words)) == ("short", 2)
    assert "memplus: MEMPLUS_NODE_KEY: a node key must have" in capsys.readouterr().err
