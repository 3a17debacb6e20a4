"""Options of row prefetch: accepted, or refused by name before tables are read."""

import logging

import pytest
import torch

from engine.errors import ConfigError
from server.model_loading import load_served
from server.model_options import ModelOptions
from tests.models import feed_forward_changes, random_model, save_model, tiny_config


@pytest.fixture
def folder(tmp_path):
    """A model with memory layers 1 and 2 of 4; each head reads 3 rows with 8 subkeys."""
    kinds = ("dense", "memory_plus", "memory_plus", "dense")
    return save_model(random_model(tiny_config(**feed_forward_changes(*kinds))), tmp_path / "model")


def loaded(folder, **options):
    return load_served(
        ModelOptions(str(folder), **options), folder, None, torch.device("cpu")
    ).model


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
def test_options_beyond_the_models_sizes_are_refused_before_tables_are_read(folder, options, named):
    for file in folder.glob("table-*"):
        file.unlink()
    with pytest.raises(ConfigError, match=named):
        loaded(folder, **options)


def test_a_model_without_memory_is_refused_before_it_is_loaded(tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="table_lookahead: this model has no memory layers"):
        loaded(folder, table_lookahead=1)


def test_the_largest_options_are_accepted_and_auto_logs_that_they_are_not_used(folder, caplog):
    caplog.set_level(logging.WARNING)
    loaded(folder)
    assert not caplog.records
    loaded(folder, table_lookahead=3, table_lookahead_share=2.5)
    (record,) = caplog.records
    assert record.getMessage() == "all value tables are in memory: --table-lookahead has no effect"
