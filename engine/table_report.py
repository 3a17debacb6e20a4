"""Describes a value table and the reads of its rows."""

from engine.executors.row_usage import RowUsage
from engine.model.config import ModelConfig
from engine.request import TableReport
from memory_ops.tables.value_table import ValueTable


def table_report(
    name: str, table: ValueTable, config: ModelConfig, usage: RowUsage | None
) -> TableReport:
    """The report on one table of a model; without ``usage`` its reads are not counted."""
    layers = (
        layer
        for layer in config.memory_layers
        if name in (config.layer_tables(layer).values, config.layer_tables(layer).down)
    )
    return TableReport(
        name=name,
        tier=table.tier,
        num_rows=table.num_rows,
        value_dim=table.value_dim,
        layers=tuple(layers),
        usage=None if usage is None else usage.summary(),
    )
