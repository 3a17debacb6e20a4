"""Loads value tables into page-locked host memory, for a GPU that caches their rows."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import torch

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from memory_ops.page_lock import PageLockError
from memory_ops.tables.host import HostTable, host_table
from memory_ops.tables.value_table import ValueTable
from weights.checkpoints.memory_request import size_text
from weights.checkpoints.table_files import RowLayout
from weights.checkpoints.table_loading import check_holds_a_token, progress_bar, rows_in_memory
from weights.checkpoints.tensor_files import StoredTensor


def load_host_tables(
    stored: Sequence[StoredTensor],
    layouts: Mapping[str, RowLayout],
    config: ModelConfig,
    cache_bytes: int,
    device: torch.device,
    *,
    verify: bool = False,
    hot_rows: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, ValueTable]:
    """Tables of the host tier, by name; they share the row cache evenly.

    Rows are read straight into the memory that is then page-locked, so there is no second copy.

    Args:
        stored: the tables.
        layouts: layouts to convert them to, by name.
        config: shapes of the model.
        cache_bytes: the GPU's memory for the row caches of all tables.
        device: the GPU.
        verify: compare their data with the checksums in their files.
        hot_rows: row ids by table, most read first, with which the caches begin.

    Raises:
        CheckpointError: a table cannot be read, fails its checksum, or a row cannot be converted.
        ConfigError: memory cannot be allocated or page-locked, the rows are fp64, or the cache
            cannot hold the rows that one token reads.
    """
    assert config.memory is not None
    tables: dict[str, ValueTable] = {}
    share = cache_bytes // len(stored)
    with progress_bar("tables", stored) as progress:
        for one in stored:
            layout = layouts[one.name]
            if layout.dtype is torch.float64:
                message = "the host tier cannot hold float64 rows; use --table-dtype float32"
                raise ConfigError(f"table_dtype: {message}")
            rows = rows_in_memory(one, layout, "host", progress.update, verify=verify)
            table = _page_locked(rows, layout, share, device, config.num_layers)
            check_holds_a_token(table, config.memory, one.name)
            if hot_rows and one.name in hot_rows:
                table.fill_cache(hot_rows[one.name], _first_layer(config, one.name))
            tables[one.name] = table
    return tables


def _first_layer(config: ModelConfig, table: str) -> int:
    """The first memory layer that reads a table, whose statistics count its first rows."""
    return next(i for i in config.memory_layers if table in astuple(config.layer_tables(i)))


def _page_locked(
    rows: torch.Tensor, layout: RowLayout, cache_bytes: int, device: torch.device, num_layers: int
) -> HostTable:
    try:
        return host_table(layout.table(rows), cache_bytes, device, num_layers=num_layers)
    except PageLockError as error:
        raise ConfigError(
            f"table_tier: host {error}; raise the limit of locked memory (`ulimit -l`), free"
            f" {size_text(rows.nbytes)} of host memory, or use a smaller --table-dtype"
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
