"""Opens and validates a checkpoint folder, loads its model, and saves new folders."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.grouped_layers import groupable, use_groups
from engine.model.grouped_weights import GroupFormat
from engine.model.transformer import Transformer
from weights.checkpoints.config_json import CheckpointConfig, config_to_json, read_config
from weights.checkpoints.gpu_tier import naming_lack_of_memory
from weights.checkpoints.model_weights import (
    dense_mapped_weights,
    device_weights,
    largest_layer_bytes,
    mapped_weights,
    weight_bytes,
)
from weights.checkpoints.module_counts import check_module_counts
from weights.checkpoints.new_folder import new_folder, write_synced
from weights.checkpoints.placed_tables import placed_tables
from weights.checkpoints.stored_groups import stored_formats
from weights.checkpoints.table_files import OUTPUT_DTYPES, table_shape
from weights.checkpoints.table_loading import table_layouts
from weights.checkpoints.table_origin import table_origin
from weights.checkpoints.table_tier import check_rows_fit
from weights.checkpoints.tensor_files import (
    DTYPES,
    RECORDS_DTYPE,
    STORED_DTYPES,
    StoredTensor,
    TensorSource,
    list_tensors,
)
from weights.checkpoints.tensor_writer import write_tensors
from weights.checkpoints.tied_head import EMBEDDING, drop_tied_head
from weights.errors import CheckpointError

CPU = torch.device("cpu")
_WIDE_DTYPES = ("float32", "float64")
# buffers that trainers leave, which rope_theta and rope_scaling determine
_DERIVED_BUFFER = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\."
    r"(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)


def expected_tensors(
    config: ModelConfig, formats: Mapping[str, GroupFormat] | None = None
) -> dict[str, Tensor]:
    """Every tensor of a model by name, tables included, on the meta device.

    Tensors in groups have the dtype that they need; all others are fp32 here. ``formats`` names
    the layers whose weights are in groups; others than ``groupable`` are ignored.
    """
    with torch.device("meta"):
        model = Transformer(config)
        known = groupable(model)
        use_groups(model, {name: one for name, one in (formats or {}).items() if name in known})
        tensors = model.state_dict()
        for name in config.table_names:
            assert config.memory is not None
            tensors[name] = torch.empty(config.memory.num_rows, config.memory.value_dim)
    return tensors


def open_checkpoint(folder: Path) -> tuple[CheckpointConfig, dict[str, StoredTensor]]:
    """Read a folder's config and headers and check that they agree; allocates no tensors.

    Returns the config and the stored tensors of the model, without redundant ones.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a wrong shape or dtype, or a file
            cannot be read; the message names file and tensor.
    """
    config = read_config(folder)
    stored = list_tensors(folder)
    check_module_counts(folder, config.model, stored)
    formats = stored_formats(stored) if config.has_groups else {}
    expected, tables = expected_tensors(config.model, formats), config.model.table_names
    if config.model.tie_embeddings:
        drop_tied_head(stored)
    for name, tensor in list(stored.items()):
        if _DERIVED_BUFFER.fullmatch(name):
            del stored[name]
            continue
        if name not in expected:
            raise CheckpointError(f"{tensor.file}: tensor {name} is unknown to this model")
        wanted = expected[name]
        if (shape := table_shape(tensor) if name in tables else tensor.shape) != wanted.shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(shape)}, but the config"
                f" requires {list(wanted.shape)}"
            )
        exact = [code for code, dtype in STORED_DTYPES.items() if dtype is wanted.dtype]
        allowed = [*DTYPES] if wanted.dtype is torch.float32 else exact
        if name in tables:
            allowed.append(RECORDS_DTYPE)
        if tensor.dtype not in allowed:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, not one of"
                f" {', '.join(allowed)}"
            )
    for name in expected:
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
    return config, stored


def serving_dtype(
    config: CheckpointConfig, stored: Mapping[str, StoredTensor], dtype: str
) -> torch.dtype:
    """The dtype to serve in: ``dtype``, or for ``auto`` float32 if the embedding is at least that
    wide, else bfloat16. If the embedding is in groups, the dtype in the config counts.

    Raises:
        ValueError: ``dtype`` is not one of auto, bfloat16, float16, float32.
    """
    if dtype == "auto":
        code = stored[EMBEDDING].dtype
        is_wide = code in ("F32", "F64") if code in DTYPES else config.dtype in _WIDE_DTYPES
        return torch.float32 if is_wide else torch.bfloat16
    chosen = OUTPUT_DTYPES.get(dtype)
    if chosen is None:
        raise ValueError(f"dtype: {dtype!r} is not one of auto, {', '.join(OUTPUT_DTYPES)}")
    return chosen


def load_model(
    folder: Path,
    dtype: str = "auto",
    table_cache: int | None = None,
    *,
    device: torch.device = CPU,
    host_cache: int | None = None,
    table_dtype: str = "auto",
    verify_tables: bool = False,
    keep_stored: bool = False,
    fill_cache: bool = True,
) -> tuple[Transformer, CheckpointConfig]:
    """Load a folder's model for serving.

    The model is built on the meta device, and weights are assigned to it. On the CPU they are
    mapped, and those that are stored in the serving dtype are not copied. On a GPU they are read
    into its memory through two page-locked buffers. For the tables see ``placed_tables``.

    Args:
        folder: the checkpoint folder.
        dtype: dtype of the weights; see ``serving_dtype``.
        table_cache: bytes of row cache for all tables; see ``placed_tables``.
        device: the CPU or a GPU.
        host_cache: bytes of the cache in host memory, of tables that a GPU reads from disk.
        table_dtype: dtype of tables in memory, one of ``TABLE_DTYPES``; auto: as stored.
        verify_tables: compare the tables' data with the checksums in their files.
        keep_stored: load weights for an executor: those in groups stay so, and on the CPU all are
            mapped as they are stored, and the executor converts one layer at a time. Otherwise they
            get ``dtype``, those in groups too.
        fill_cache: fill the row caches with the rows that the folder lists as hot, if any.

    Raises:
        CheckpointError: as ``open_checkpoint``, or a weight outside tables is not finite, or a
            table cannot be read or fails its checksum.
        ConfigError: a table option is not possible, or host or GPU have too little memory.
        ValueError: ``dtype`` is not one of auto, bfloat16, float16, float32.
    """
    config, stored = open_checkpoint(folder)
    chosen = serving_dtype(config, stored, dtype)
    tables = [stored.pop(name) for name in config.model.table_names]
    if not tables:
        check_no_table_options(table_cache, table_dtype, verify_tables)
    layouts = table_layouts(tables, table_dtype)
    all_rows = sum(layout.num_bytes for layout in layouts.values())
    row_bytes = all_rows if table_cache is None else table_cache
    if table_cache is None and device.type == "cpu":
        check_rows_fit(folder, all_rows)
    needed = _needed_bytes(stored, chosen, keep_stored)
    caches, is_on_disk = (table_cache, host_cache), host_cache is not None
    is_cached = table_cache is not None
    with naming_lack_of_memory(device, needed, row_bytes, is_cached, is_on_disk=is_on_disk):
        model = _read_model(config.model, stored, chosen, device, keep_stored)
        if tables:
            options = config.model, caches, device
            place = partial(placed_tables, verify=verify_tables, fill_cache=fill_cache)
            model.attach_tables(place(folder, tables, layouts, *options))
    if device.type == "cuda":
        # return staging memory to the GPU: the executor measures what is left
        torch.cuda.empty_cache()
    return model.eval().requires_grad_(False), config


def _needed_bytes(stored: Mapping[str, StoredTensor], dtype: torch.dtype, keep_stored: bool) -> int:
    """Bytes of the weights while they are loaded; see ``load_model``."""
    if keep_stored:
        return weight_bytes(stored, dtype, stored_formats(stored))
    return weight_bytes(stored, dtype, {}) + largest_layer_bytes(stored)


def _read_model(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    keep_stored: bool,
) -> Transformer:
    """The model without tables; see ``load_model``."""
    with torch.device("meta"):
        model = Transformer(config)
    formats = stored_formats(stored)
    shapes = model.state_dict()
    inputs = {name: shapes[f"{name}.weight"].shape[1] for name in formats}
    if keep_stored:
        use_groups(model, formats)
        inputs = {}
    if device.type != "cpu":
        weights = device_weights(stored, dtype, device, inputs)
    elif keep_stored:
        weights = mapped_weights(stored)
    else:
        weights = dense_mapped_weights(stored, dtype, inputs)
    model.load_state_dict(weights, assign=True)
    model.rope_frequencies = model.rope_frequencies.to(device)
    return model


def save_checkpoint(
    folder: Path,
    config: CheckpointConfig,
    sources: list[TensorSource],
    extra_files: Mapping[str, bytes],
    on_write: Callable[[int], Any] = lambda num_bytes: None,
    *,
    more_tensors: Mapping[str, list[TensorSource]] | None = None,
    finish: Callable[[Path], Any] = lambda folder: None,
) -> None:
    """Write a checkpoint folder atomically: under a temporary name, which is renamed at the end.

    Args:
        folder: path of the new folder; must not exist yet.
        sources: the model's tensors and tables; each table gets a separate file with a checksum.
        extra_files: contents of further files (tokenizer files, for example), by file name.
        on_write: called with the bytes of each tensor, or part of one, after it is written.
        more_tensors: tensors that are not part of the model, by file name.
        finish: called with the temporary folder once it is a complete checkpoint; may add files.

    Raises:
        CheckpointError: the folder exists, or cannot be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already")
    tables = config.model.table_names
    try:
        with new_folder(folder) as made:
            dense = [source for source in sources if source.name not in tables]
            write_tensors(made / "model.safetensors", dense, on_write)
            for index, name in enumerate(tables):
                table = [source for source in sources if source.name == name]
                write_tensors(made / f"table-{index:05}.safetensors", table, on_write, True)
            for file_name, others in (more_tensors or {}).items():
                write_tensors(made / file_name, others, on_write)
            text = json.dumps(config_to_json(config), indent=2) + "\n"
            for file_name, content in {**extra_files, "config.json": text.encode()}.items():
                write_synced(made / file_name, content)
            finish(made)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror})") from None


def table_origins(folder: Path) -> dict[str, str]:
    """The origin of each table of a checkpoint folder, by table name (CheckpointError)."""
    config, stored = open_checkpoint(folder)
    return {name: table_origin(stored[name]) for name in config.model.table_names}


def check_no_table_options(table_cache: int | None, table_dtype: str, verify_tables: bool) -> None:
    """Raise ConfigError for table options of a model without tables; None: not set."""
    problem = "value tables, but this model has none"
    if table_cache is not None:
        raise ConfigError(f"table_cache: requires {problem}")
    if table_dtype != "auto":
        raise ConfigError(f"table_dtype: requires {problem}")
    if verify_tables:
        raise ConfigError(f"verify_tables: requires {problem}")
