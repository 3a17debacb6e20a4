"""Models and tables of drawn weights, by default on the GPU, and copies of models."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from engine.model.config import ModelConfig
from engine.model.grouped_layers import GroupedEmbedding, GroupedLinear, use_groups
from engine.model.grouped_weights import GroupFormat, group_weights
from engine.model.transformer import Transformer
from memory_ops.checks import Table
from memory_ops.row_formats import RowRecords
from memory_ops.tables.device import DeviceTable
from weights.training.initialise import initialise

GPU = torch.device("cuda", 0)
_DRAWN_ROWS = 2**16  # at once


@torch.no_grad()
def drawn_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device = GPU, seed: int = 0
) -> Transformer:
    """A model without tables whose weights are drawn in place, as for training."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    initialise(model, torch.Generator(device).manual_seed(seed))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def round_weights(model: Transformer, formats: Mapping[str, GroupFormat]) -> None:
    """Round the weights of layers, by name, to groups, in place and layer by layer."""
    for name, one in formats.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Embedding)
        groups = group_weights(layer.weight, one.bits)
        bias = layer.bias if isinstance(layer, nn.Linear) else None
        with torch.device("meta"):
            use_groups(model, {name: one})
        made = model.get_submodule(name)
        assert isinstance(made, GroupedLinear | GroupedEmbedding)
        made.groups = groups
        if isinstance(made, GroupedLinear):
            made.bias = bias


@torch.no_grad()
def drawn_table(num_rows: int, width: int, dtype: torch.dtype, device: torch.device = GPU) -> Table:
    """A table ``[R, V]`` of N(0, 1 / V), drawn in place and part by part."""
    table_RV = torch.empty(num_rows, width, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    for first in range(0, num_rows, _DRAWN_ROWS):
        table_RV[first : first + _DRAWN_ROWS].normal_(std=width**-0.5, generator=generator)
    return table_RV


def copied(model: Transformer, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A copy of a model, whose tables are in memory, on a device; tables keep their dtype."""
    with torch.device("meta"):
        made = Transformer(model.config)
    weights = {
        name: weight.to(device, dtype, copy=True) for name, weight in model.state_dict().items()
    }
    made.load_state_dict(weights, assign=True)
    made.rope_frequencies = model.rope_frequencies.to(device)
    tables = {name: DeviceTable(_moved(table, device)) for name, table in model.tables.items()}
    made.attach_tables(tables)
    return made.eval().requires_grad_(False)


def _moved(table: object, device: torch.device) -> Table:
    assert isinstance(table, DeviceTable)
    rows = table.rows
    if isinstance(rows, RowRecords):
        return replace(rows, records_RB=rows.records_RB.to(device))
    return rows.to(device)
