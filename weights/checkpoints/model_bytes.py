"""Sizes in bytes of a served model's parts, read from the headers of its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.model.grouped_weights import GroupFormat
from memory_ops.tables.disk import row_cache_bytes
from weights.checkpoints.checkpoint import CPU, open_checkpoint, serving_dtype
from weights.checkpoints.host_cache_limits import HostCacheLimits, host_cache_limits
from weights.checkpoints.model_weights import largest_layer_bytes, weight_bytes
from weights.checkpoints.packed_formats import packed_formats
from weights.checkpoints.table_loading import table_layouts
from weights.checkpoints.tensor_files import STORED_DTYPES, StoredTensor
from weights.checkpoints.tied_head import EMBEDDING


@dataclass(frozen=True)
class ModelBytes:
    """Memory in bytes that a served model takes.

    Attributes:
        weights: bytes of all tensors except the value tables.
        tables: bytes of all value tables in their served format; 0 if there are none.
        disk_cache: row caches that hold all rows of tables on disk; 0 without tables.
        host_cache: limits of the row cache if the tables lie in host memory; 0 without tables.
        kv_per_token: bytes of one token's keys and values in all layers.
        dtype: dtype in which the model is served.
    """

    weights: int
    tables: int
    disk_cache: int
    host_cache: HostCacheLimits
    kv_per_token: int
    dtype: torch.dtype


def model_bytes(
    folder: Path,
    dtype: str,
    table_dtype: str,
    kv_dtype: str = "auto",
    packed_dtype: str | None = None,
    device: torch.device = CPU,
) -> ModelBytes:
    """The sizes of what ``load_model`` would load; reads only headers.

    ``kv_dtype`` is that of ``EngineConfig``. ``packed_dtype`` is given if an executor reads weights
    in groups: the dtype to which it rounds them, or auto. Otherwise all are dense.

    Raises:
        CheckpointError, ConfigError, ValueError: as ``load_model``.
    """
    config, stored = open_checkpoint(folder)
    chosen = serving_dtype(config, stored, dtype)
    tables = [stored.pop(name) for name in config.model.table_names]
    layouts = table_layouts(tables, table_dtype).values()
    row_sizes = [layout.num_bytes // layout.shape[0] for layout in layouts]
    memory = config.model.memory
    if packed_dtype is None:
        weights = weight_bytes(stored, chosen, {}) + largest_layer_bytes(stored)
    else:
        formats = packed_formats(config.model, stored, packed_dtype)
        weights = weight_bytes(stored, chosen, formats)
        if config.model.tie_embeddings and device.type == "cpu":
            weights += _converted_bytes(stored[EMBEDDING], chosen, packed_dtype, formats)
    return ModelBytes(
        weights=weights,
        tables=sum(layout.num_bytes for layout in layouts),
        # open_tables gives every table the same share
        disk_cache=len(row_sizes)
        * row_cache_bytes(memory.num_rows, max(row_sizes), memory.num_rows)
        if memory
        else 0,
        host_cache=host_cache_limits(layouts, memory) if memory else HostCacheLimits(0, 0),
        kv_per_token=config.model.kv_bytes_per_token(chosen.itemsize, kv_dtype),
        dtype=chosen,
    )


def _converted_bytes(
    embedding: StoredTensor,
    dtype: torch.dtype,
    packed_dtype: str,
    formats: Mapping[str, GroupFormat],
) -> int:
    """Bytes of the rows of a tied embedding; 0 if they are those of the file.

    The CPU executor keeps these rows and the packed head, another copy of the same weights.
    """
    stored = STORED_DTYPES[embedding.dtype]
    if packed_dtype == "auto" and (stored is dtype or not stored.is_floating_point):
        return 0
    return weight_bytes({EMBEDDING: embedding}, dtype, formats)
