"""Opens value tables on disk for a GPU, behind row caches in its memory and in host memory."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.executors.cuda.micro_batches import HINTS_PER_LAYER
from engine.model.config import ModelConfig
from memory_ops.page_lock import PageLockError
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.gpu_disk import gpu_disk_table
from memory_ops.tables.host_calls import HostCalls
from memory_ops.tables.value_table import ValueTable
from weights.checkpoints.memory_request import size_text
from weights.checkpoints.table_files import RowLayout
from weights.checkpoints.table_loading import open_tables
from weights.checkpoints.tensor_files import StoredTensor


def open_gpu_disk_tables(
    stored: Sequence[StoredTensor],
    layouts: Mapping[str, RowLayout],
    config: ModelConfig,
    caches: tuple[int, int],
    device: torch.device,
    *,
    verify: bool = False,
    hot_rows: Mapping[str, Tensor] | None = None,
) -> dict[str, ValueTable]:
    """Tables of the disk tier, by name, that a GPU reads; they share both row caches evenly.

    Args:
        stored, layouts, verify: as for ``open_tables``.
        config: shapes of the model.
        caches: bytes of the row caches in the GPU's memory and in host memory.
        device: the GPU.
        hot_rows: row ids by table, most read first, with which the host's caches begin.

    Raises:
        CheckpointError: as ``open_tables``.
        ConfigError: as ``open_tables``; or the rows are fp64, or memory cannot be allocated or
            page-locked.
    """
    assert config.memory is not None
    gpu_cache, host_cache = caches
    if any(layouts[one.name].dtype is torch.float64 for one in stored):
        how = "`memplus quantize` converts them"
        raise ConfigError(f"table_dtype: a GPU cannot read float64 rows from disk; {how}")
    opened = open_tables(
        stored, layouts, config.memory, host_cache, hot_rows=hot_rows, verify=verify
    )
    calls, tables = HostCalls(), {}
    for name, table in opened.items():
        assert isinstance(table, DiskTable)
        share = gpu_cache // len(opened)
        readers = [i for i in config.memory_layers if name in astuple(config.layer_tables(i))]
        try:
            tables[name] = gpu_disk_table(
                table,
                share,
                device,
                calls,
                num_layers=config.num_layers,
                num_hints=len(readers) * HINTS_PER_LAYER,
            )
        except PageLockError as error:
            raise ConfigError(
                f"table_tier: disk {error}; raise the limit of locked memory (`ulimit -l`), free"
                f" {size_text(host_cache)} of host memory, or use a smaller --table-cache"
            ) from None
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return {**tables}
