"""A checkpoint folder: the model it describes, checked against its tensors, loaded and saved."""

import json
import math
import re
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.transformer import Transformer
from weights.checkpoints.config_json import CheckpointConfig, config_to_json, read_config
from weights.checkpoints.new_folder import new_folder, write_synced
from weights.checkpoints.table_files import table_shape
from weights.checkpoints.table_loading import load_tables, open_tables, table_layouts
from weights.checkpoints.tensor_files import (
    DTYPES,
    RECORDS_DTYPE,
    StoredTensor,
    TensorSource,
    list_tensors,
    read_mapped,
)
from weights.checkpoints.tensor_writer import write_tensors
from weights.errors import CheckpointError

# a buffer that old checkpoints carry; rope_theta says the same
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, tables included."""
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in config.table_names:
        assert config.memory is not None
        shapes[name] = (config.memory.num_rows, config.memory.value_dim)
    return shapes


def open_checkpoint(folder: Path) -> tuple[CheckpointConfig, dict[str, StoredTensor]]:
    """Read a folder's config and headers and check that they agree; nothing is allocated.

    Returns the config and the stored tensors of the model, those without a meaning left out.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a wrong shape or dtype, or a file
            cannot be read; the message names file and tensor.
    """
    config = read_config(folder)
    stored = list_tensors(folder)
    last = f"model.layers.{config.model.num_layers - 1}.input_layernorm.weight"
    if last not in stored:  # before a model of so many layers is described
        raise CheckpointError(f"{folder}: tensor {last} is missing")
    expected, tables = expected_shapes(config.model), config.model.table_names
    for name, tensor in list(stored.items()):
        if _DERIVED.fullmatch(name):
            del stored[name]
        elif name == "lm_head.weight" and config.model.tie_embeddings:
            _check_tied_head(stored)
            del stored[name]
        elif name not in expected:
            raise CheckpointError(f"{tensor.file}: tensor {name} is unknown to this model")
        elif (shape := table_shape(tensor) if name in tables else tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(shape)}, the config asks for"
                f" {list(expected[name])}"
            )
        elif tensor.dtype not in DTYPES and not (name in tables and tensor.dtype == RECORDS_DTYPE):
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, not one of"
                f" {', '.join(DTYPES)}"
            )
    for name in expected:
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
    return config, stored


def serving_dtype(stored: Mapping[str, StoredTensor], dtype: str) -> torch.dtype:
    """The dtype to serve in: ``dtype`` itself, or for ``auto`` float32 for wide weights, else
    bfloat16."""
    if dtype == "auto":
        wide = stored["model.embed_tokens.weight"].dtype in ("F32", "F64")
        return torch.float32 if wide else torch.bfloat16
    chosen = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(dtype)
    if chosen is None:
        raise ValueError(f"dtype: {dtype!r} is not one of auto, bfloat16, float32")
    return chosen


@dataclass(frozen=True)
class ModelBytes:
    """Memory that a model takes when it is served.

    Attributes:
        weights: of all but the value tables.
        tables: of all value tables in the format that they are served in; 0 without any.
        kv_per_token: of keys and values of all layers.
        dtype: that the model is served in.
    """

    weights: int
    tables: int
    kv_per_token: int
    dtype: torch.dtype


def model_bytes(folder: Path, dtype: str, table_dtype: str) -> ModelBytes:
    """The sizes of what ``load_model`` would load; reads headers alone.

    Raises:
        CheckpointError, ConfigError, ValueError: as ``load_model``.
    """
    config, stored = open_checkpoint(folder)
    chosen = serving_dtype(stored, dtype)
    itemsize = chosen.itemsize
    tables = [stored.pop(name) for name in config.model.table_names]
    return ModelBytes(
        weights=itemsize * sum(math.prod(one.shape) for one in stored.values()),
        tables=sum(layout.num_bytes for layout in table_layouts(tables, table_dtype).values()),
        kv_per_token=config.model.kv_bytes_per_token(itemsize),
        dtype=chosen,
    )


def load_model(
    folder: Path,
    dtype: str = "auto",
    table_cache: int | None = None,
    *,
    table_dtype: str = "auto",
    verify_tables: bool = False,
    keep_stored: bool = False,
) -> tuple[Transformer, CheckpointConfig]:
    """Load a folder's model for serving, on the CPU.

    The model is built on the meta device and the mapped weights are assigned to it: weights that
    are stored in the serving dtype are never copied. Tables are read into memory, or stay in their
    files.

    Args:
        folder: the model's.
        dtype: of weights; see ``serving_dtype``.
        table_cache: bytes of memory for rows of all tables, which then stay in their files; None
            for all rows in memory.
        table_dtype: one of ``TABLE_DTYPES`` that tables in memory are converted to, or auto: as
            stored.
        verify_tables: whether their data are compared with the checksums in their files.
        keep_stored: leave all weights mapped in their stored dtypes, for an executor that converts
            them itself, one layer at a time.

    Raises:
        CheckpointError: as ``open_checkpoint``, a table cannot be read, or is not what it was.
        ConfigError: what is asked of tables cannot be, or there are none.
        ValueError: ``dtype`` is not one of auto, bfloat16, float32.
    """
    config, stored = open_checkpoint(folder)
    chosen = serving_dtype(stored, dtype)
    tables = [stored.pop(name) for name in config.model.table_names]
    if not tables:
        _check_nothing_asked(table_cache, table_dtype, verify_tables)
    layouts = table_layouts(tables, table_dtype)
    _allow_descriptors()
    with torch.device("meta"):
        model = Transformer(config.model)
    weights = {name: read_mapped(tensor) for name, tensor in stored.items()}
    if not keep_stored:
        weights = {name: weight.to(chosen) for name, weight in weights.items()}
    model.load_state_dict(weights, assign=True)
    memory = config.model.memory
    if memory is not None and table_cache is not None:
        held = open_tables(tables, layouts, memory, table_cache, verify=verify_tables)
        model.attach_tables(held)
    elif memory is not None:
        model.attach_tables(load_tables(tables, layouts, verify=verify_tables))
    return model.eval().requires_grad_(False), config


def save_checkpoint(
    folder: Path,
    config: CheckpointConfig,
    sources: list[TensorSource],
    extra_files: Mapping[str, bytes],
    written: Callable[[int], Any] = lambda num_bytes: None,
    *,
    more_tensors: Mapping[str, list[TensorSource]] | None = None,
) -> None:
    """Write a checkpoint folder: under a temporary name first, renamed when it is whole.

    Args:
        folder: must not exist yet.
        sources: the model's tensors, tables included; each table gets a file of its own, with a
            checksum.
        extra_files: tokenizer files and the like, by name.
        more_tensors: what is no part of the model, by the file that it goes to.
        written: told the bytes of each tensor, or part of one, as it is written.

    Raises:
        CheckpointError: the folder exists, or cannot be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already")
    tables = config.model.table_names
    try:
        with new_folder(folder) as partial:
            dense = [source for source in sources if source.name not in tables]
            write_tensors(partial / "model.safetensors", dense, written)
            for index, name in enumerate(tables):
                table = [source for source in sources if source.name == name]
                write_tensors(partial / f"table-{index:05}.safetensors", table, written, True)
            for file_name, others in (more_tensors or {}).items():
                write_tensors(partial / file_name, others, written)
            text = json.dumps(config_to_json(config), indent=2) + "\n"
            for file_name, content in {**extra_files, "config.json": text.encode()}.items():
                write_synced(partial / file_name, content)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror})") from None


def _check_nothing_asked(table_cache: int | None, table_dtype: str, verify_tables: bool) -> None:
    """Refuse what is asked of a model's tables where it has none."""
    none = "value tables, and this model has none"
    if table_cache is not None:
        raise ConfigError(f"table_tier: disk is for {none}")
    if table_dtype != "auto":
        raise ConfigError(f"table_dtype: is for {none}")
    if verify_tables:
        raise ConfigError(f"verify_tables: is for {none}")


def _allow_descriptors() -> None:
    """Raise the soft limit, often 1,024: large models have as many mapped tensors."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check_tied_head(stored: Mapping[str, StoredTensor]) -> None:
    head, embedding = stored["lm_head.weight"], stored.get("model.embed_tokens.weight")
    if embedding is None or embedding.dtype not in DTYPES:
        return  # the embedding is refused by its own name
    is_alike = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not is_alike or not torch.equal(read_mapped(head), read_mapped(embedding)):
        raise CheckpointError(
            f"{head.file}: tensor lm_head.weight differs from the embedding to which"
            " tie_word_embeddings ties it"
        )
