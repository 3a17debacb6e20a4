"""What is asked of looking ahead is had, or refused or told of by name, before tables are read."""

import logging

import pytest

from engine.errors import ConfigError
from server.config import ModelOptions
from server.engine_entry import load_served
from tests.models import feed_forward_changes, random_model, save_model, tiny_config


@pytest.fixture
def folder(tmp_path):
    """Memories in layers 1 and 2 of 4, which read 3 rows a head by 8 subkeys."""
    kinds = ("dense", "memory_plus", "memory_plus", "dense")
    return save_model(random_model(tiny_config(**feed_forward_changes(*kinds))), tmp_path / "model")


def loaded(folder, **options):
    return load_served(ModelOptions(str(folder), **options), folder, None).model


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"table_lookahead": 4}, "table_lookahead: must be at most 3, the layers"),
        (
            {"table_lookahead": 1, "table_lookahead_share": 3.0},
            "table_lookahead_share: 3.0 of 3 rows is 9 rows, but at most 8 can",
        ),
    ],
)
def test_more_than_a_model_has_is_refused_before_its_tables_are_read(folder, options, named):
    for file in folder.glob("table-*"):
        file.unlink()
    with pytest.raises(ConfigError, match=named):
        loaded(folder, **options)


def test_a_model_without_memory_is_refused_before_it_is_loaded(tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="table_lookahead: this model has no memory layers"):
        loaded(folder, table_lookahead=1)


def test_as_much_as_a_model_has_is_taken_and_auto_says_where_it_is_not_used(folder, caplog):
    caplog.set_level(logging.WARNING)
    loaded(folder)
    assert not caplog.records
    loaded(folder, table_lookahead=3, table_lookahead_share=2.5)
    (record,) = caplog.records
    assert record.getMessage() == "all value tables are in memory: --table-lookahead has no effect"
