"""Creates the model of a training run: initialised, or continued from a checkpoint folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.transformer import Transformer
from memory_ops.anonymous import anonymous_zeros
from memory_ops.page_lock import PageLockError
from memory_ops.tables.trained import TrainedTable
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.config_json import CheckpointConfig, config_to_json, parse_model
from weights.checkpoints.table_files import table_shape
from weights.checkpoints.tensor_files import StoredTensor, read_mapped
from weights.checkpoints.tensor_part import TensorPart, part_of_table, read_part
from weights.training.initialise import (
    check_starts,
    initialise,
    initialise_part,
    initialise_table,
)
from weights.training.table_sharding import TableSharding
from weights.training.train_config import check_model_keys


def model_config(raw: Mapping[str, Any], vocab_size: int, init_from: str = "") -> ModelConfig:
    """Config of the model: the ``model`` section on top of the config of folder ``init_from``.

    Raises:
        ConfigError: a key is unknown, ignored or missing, or has an invalid value; the message
            names it. Or the folder's weights are in groups of few bits.
        CheckpointError: the folder cannot be read.
    """
    check_model_keys(raw)
    whole: dict[str, Any] = {}
    if init_from:
        whole = config_to_json(_open_exact(init_from)[0])
    if "memory" in whole and isinstance(raw.get("memory"), dict):
        raw = {**raw, "memory": whole["memory"] | raw["memory"]}
    whole |= {**raw, "vocab_size": vocab_size}
    try:
        return parse_model(whole)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def new_model(
    config: ModelConfig,
    seed: int,
    init_from: str = "",
    device: str = "cpu",
    *,
    table_tier: str = "device",
    is_dense_frozen: bool = False,
    sharding: TableSharding | None = None,
) -> tuple[Transformer, dict[str, TrainedTable]]:
    """A float32 model to train, and its tables by their names in a checkpoint.

    Weights are initialised on the CPU, so that a seed gives the same values on every device.
    Tensors of the folder ``init_from`` then replace the initial ones. It may lack memory layers.
    With ``is_dense_frozen``, only the weights of memory layers require gradients. Tables stay in
    host memory if ``table_tier`` is ``host``. With ``sharding``, tables have only this process's
    part of the rows or columns, which are those of the whole table.

    Raises:
        ConfigError: a tensor of that folder has another shape, or one outside the memory layers is
            missing there, or its weights are in groups of few bits; or a memory beside a
            feed-forward cannot start at 0, or there is nothing to train; or the device cannot train
            from host memory.
        CheckpointError: the folder cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    try:
        initialise(model, generator)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None
    memory = config.memory
    sharding = sharding or TableSharding()
    rows: dict[str, TensorPart] = {}
    for name in config.table_names:
        assert memory is not None
        shape = memory.num_rows, memory.value_dim
        shard = sharding.shard(shape)
        table_RV = anonymous_zeros(shape if shard is None else shard.local_shape, torch.float32)
        if shard is None:
            initialise_table(table_RV, generator)
        else:
            initialise_part(table_RV, shard, generator)
        rows[name] = part_of_table(table_RV, shard)
    if init_from:
        _, stored = _open_exact(init_from)
        weights = {name: tuple(one.shape) for name, one in model.named_parameters()}
        _check_stored(weights, config, stored, init_from)
        _copy_weights(model, rows, stored)
    if is_dense_frozen:
        _freeze_dense(model)
    model.to(device)
    tables = {
        name: _placed_part(rows.pop(name), device, table_tier, sharding) for name in tuple(rows)
    }
    if tables:
        model.attach_tables(tables)
    return model, tables


def planned_model(
    config: ModelConfig, init_from: str = "", *, is_dense_frozen: bool = False
) -> Transformer:
    """The model of ``new_model`` without tables on the meta device, after the same checks.

    Raises:
        ConfigError, CheckpointError: as ``new_model``.
    """
    with torch.device("meta"):
        model = Transformer(config)
    try:
        check_starts(model)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None
    if init_from:
        weights = {name: tuple(one.shape) for name, one in model.named_parameters()}
        _check_stored(weights, config, _open_exact(init_from)[1], init_from)
    if is_dense_frozen:
        _freeze_dense(model)
    return model


def check_table_tier(config: ModelConfig, device: str, table_tier: str) -> None:
    """Raise ConfigError unless a model has tables that can be trained in this tier."""
    if table_tier == "device":
        return
    if device != "cuda":
        raise ConfigError(f"run.table_tier: host memory needs a GPU that reads it, not {device}")
    if not config.table_names:
        raise ConfigError("run.table_tier: host is for tables, but the model has no memory layers")


def _placed_part(
    part: TensorPart, device: str, table_tier: str, sharding: TableSharding
) -> TrainedTable:
    if part.shard is None:
        return placed_table(part.tensor, device, table_tier)
    return sharding.table(part.tensor.to(device), part.shard)


def placed_table(table_RV: Tensor, device: str, table_tier: str) -> TrainedTable:
    """A table to train, of rows on the CPU: on the device, or in host memory.

    Raises:
        ConfigError: the device cannot train tables of this tier.
    """
    if table_tier == "device":
        return TrainedTable(table_RV.to(device))
    # imports triton, which runs without a GPU do not need
    from memory_ops.tables.trained_host import trained_host_table

    try:
        return trained_host_table(table_RV, torch.device(device))
    except (ValueError, PageLockError) as error:
        raise ConfigError(f"run.table_tier: {error}") from None


def _freeze_dense(model: Transformer) -> None:
    if not model.config.memory_layers:
        raise ConfigError("run.freeze: the model has no memory layers that could be trained")
    model.requires_grad_(False)
    for layer in model.layers:
        if layer.memory is not None:
            layer.memory.requires_grad_(True)


def _open_exact(init_from: str) -> tuple[CheckpointConfig, dict[str, StoredTensor]]:
    config, stored = open_checkpoint(Path(init_from))
    if config.has_groups:
        raise ConfigError(
            f"run.init_from: the weights of {init_from} are rounded to 8 or 4 bits; use the folder"
            " that they were rounded from, or make a dense one by `memplus convert --dtype`"
        )
    return config, stored


def _check_stored(
    weights: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    folder: str,
) -> None:
    """Check that stored tensors have the shapes of the model; memory layers may be missing."""
    wanted = dict(weights)
    if config.memory is not None:
        table = (config.memory.num_rows, config.memory.value_dim)
        wanted |= dict.fromkeys(config.table_names, table)
    for name, shape in wanted.items():
        if name not in stored:
            if ".memory." not in name and name not in config.table_names:
                raise ConfigError(f"run.init_from: {folder} has no tensor {name}")
            continue
        found = stored[name].shape
        # rows in narrow formats are records, whose width is not that of the values
        is_record = name in config.table_names and len(found) == 2 and stored[name].dtype == "U8"
        if found[:1] != shape[:1] or (found != shape and not is_record):
            raise ConfigError(
                f"run.init_from: tensor {name} of {folder} has shape {list(found)}, but the"
                f" model requires {list(shape)}"
            )


@torch.no_grad()
def _copy_weights(
    model: Transformer, tables: Mapping[str, TensorPart], stored: Mapping[str, StoredTensor]
) -> None:
    """Copy the tensors that ``_check_stored`` has checked."""
    for name, parameter in model.named_parameters():
        if name in stored:
            parameter.copy_(read_mapped(stored[name]))
    for name, part in tables.items():
        if name not in stored:
            continue
        found = table_shape(stored[name])
        if found != part.shape:  # a row in a narrow format has another width
            raise ConfigError(
                f"run.init_from: rows of {name} have {found[1]} values, but the model requires"
                f" {part.shape[1]}"
            )
        read_part(stored[name], part)
