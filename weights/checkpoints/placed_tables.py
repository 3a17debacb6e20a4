"""Opens a model's tables in the tier that is chosen for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engine.model.config import ModelConfig
from memory_ops.tables.value_table import ValueTable
from weights.checkpoints.hot_rows import read_hot_rows
from weights.checkpoints.table_files import RowLayout
from weights.checkpoints.table_loading import load_tables, open_tables
from weights.checkpoints.tensor_files import StoredTensor


def placed_tables(
    folder: Path,
    stored: Sequence[StoredTensor],
    layouts: Mapping[str, RowLayout],
    config: ModelConfig,
    caches: tuple[int | None, int | None],
    device: torch.device,
    *,
    verify: bool,
    fill_cache: bool = True,
) -> dict[str, ValueTable]:
    """Tables by name: in the device's memory, in host memory behind a GPU, or on disk.

    Row caches begin with the folder's hot rows, if it lists any and ``fill_cache`` is set.

    Args:
        folder: the checkpoint folder.
        caches: bytes of row cache for all tables: on the device, where None loads all rows into its
            memory; and behind a GPU in host memory for tables that stay on disk, where None loads
            all rows into host memory.
        stored, layouts, verify: as for ``load_tables``, ``open_tables`` and ``load_host_tables``.

    Raises:
        CheckpointError, ConfigError: as those, or the list of hot rows is not valid.
        ValueError: a cache in host memory is given without one on a GPU.
    """
    assert config.memory is not None
    cache_bytes, host_cache_bytes = caches
    if host_cache_bytes is not None and (cache_bytes is None or device.type == "cpu"):
        raise ValueError("host_cache: is for tables on disk behind a GPU, with a table_cache")
    if cache_bytes is None:
        return load_tables(stored, layouts, device, verify=verify)
    hot_rows = read_hot_rows(folder, config) if fill_cache else None
    if device.type == "cpu":
        return open_tables(
            stored, layouts, config.memory, cache_bytes, hot_rows=hot_rows, verify=verify
        )
    # only a GPU needs triton, which may be absent elsewhere
    if host_cache_bytes is not None:
        from weights.checkpoints.gpu_disk_tables import open_gpu_disk_tables

        sizes = cache_bytes, host_cache_bytes
        return open_gpu_disk_tables(
            stored, layouts, config, sizes, device, hot_rows=hot_rows, verify=verify
        )
    from weights.checkpoints.host_tables import load_host_tables

    return load_host_tables(
        stored, layouts, config, cache_bytes, device, hot_rows=hot_rows, verify=verify
    )
