"""A model as a plan needs it: its shapes and the bytes of its parts, with or without weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.model.config import ModelConfig
from engine.model.step_work import ModelWork
from memory_ops.row_formats import ROW_FORMATS, row_bytes
from server.plan.options import PlanOptions
from weights.checkpoints.checkpoint import expected_tensors, open_checkpoint, serving_dtype
from weights.checkpoints.config_json import parse_model
from weights.checkpoints.packed_formats import packed_formats
from weights.checkpoints.table_files import OUTPUT_DTYPES, requested_layout
from weights.checkpoints.tensor_files import StoredTensor
from weights.errors import CheckpointError
from weights.text_files import read_json_object


@dataclass(frozen=True)
class PlannedModel:
    """Sizes of a model in the dtypes in which it will be served.

    Attributes:
        config: shapes.
        dense: number of parameters outside the tables.
        weight_bytes: bytes of these.
        row_bytes: bytes of a table row; 0 without tables.
        table_bytes: bytes of all tables.
        kv_bytes: bytes of one token's keys and values in all layers.
        work: the least work of a step.
    """

    config: ModelConfig
    dense: int
    weight_bytes: int
    row_bytes: int
    table_bytes: int
    kv_bytes: int
    work: ModelWork


def planned_model(source: Path, options: PlanOptions, *, is_on_gpu: bool) -> PlannedModel:
    """Read the headers of a checkpoint folder, or a ``config.json`` without weights.

    Raises:
        CheckpointError: the file or folder is not valid.
        ConfigError: the stored rows cannot be converted to the requested dtype.
    """
    stored: dict[str, StoredTensor] = {}
    dtype = OUTPUT_DTYPES["bfloat16" if options.dtype == "auto" else options.dtype]
    if source.is_file():
        try:
            config = parse_model(read_json_object(source))
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None
    else:
        checkpoint, stored = open_checkpoint(source)
        config, dtype = checkpoint.model, serving_dtype(checkpoint, stored, options.dtype)
    formats = packed_formats(config, stored, options.weight_dtype)
    tensors = expected_tensors(config, formats)
    tables = [tensors.pop(name) for name in config.table_names]
    bytes_per_row = _row_bytes(config, stored, options.table_dtype)
    plain = expected_tensors(config)
    return PlannedModel(
        config=config,
        dense=sum(one.numel() for name, one in plain.items() if name not in config.table_names),
        weight_bytes=sum(
            one.numel() * (dtype if one.dtype is torch.float32 else one.dtype).itemsize
            for one in tensors.values()
        ),
        row_bytes=bytes_per_row,
        table_bytes=sum(bytes_per_row * len(table) for table in tables),
        kv_bytes=config.kv_bytes_per_token(dtype.itemsize, options.kv_dtype),
        work=ModelWork(
            config,
            dtype.itemsize,
            bytes_per_row,
            formats,
            options.kv_dtype,
            has_integer_products=not is_on_gpu,
        ),
    )


def _row_bytes(config: ModelConfig, stored: dict[str, StoredTensor], dtype: str) -> int:
    """Bytes of one row; all tables of a model have the same."""
    if config.memory is None:
        return 0
    chosen = None if dtype == "auto" else dtype
    if stored:
        layout = requested_layout(stored[config.table_names[0]], chosen)
        return layout.num_bytes // layout.shape[0]
    for row_format in ROW_FORMATS:
        if row_format == chosen:
            return row_bytes(row_format, config.memory.value_dim)
    return OUTPUT_DTYPES[chosen or "bfloat16"].itemsize * config.memory.value_dim
