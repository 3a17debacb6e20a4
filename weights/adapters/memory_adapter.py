"""Memory adapters: folders that hold only the memory layers added to a finished model.

An adapter folder has ``memory_adapter.json``, the memory layers' weights in ``model.safetensors``,
and ``table-*.safetensors``. The description names the base by the hash of its weights, and has the
config of the whole model. Together with its base an adapter is a checkpoint folder.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from weights.adapters.adapter_files import DESCRIPTION, files_of
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.config_json import (
    CheckpointConfig,
    config_to_json,
    parse_model,
    read_config,
)
from weights.checkpoints.convert import read_folder
from weights.checkpoints.feed_forward_json import feed_forward_to_json
from weights.checkpoints.hot_rows import HOT_ROWS_FILE
from weights.checkpoints.json_fields import typed
from weights.checkpoints.new_folder import new_folder, write_synced
from weights.checkpoints.table_files import ROW_READS_FILE
from weights.checkpoints.tensor_files import list_tensors, read_mapped
from weights.checkpoints.tensor_writer import write_tensors
from weights.checkpoints.weights_hash import weights_hash
from weights.errors import CheckpointError
from weights.text_files import read_json_object

FORMAT_VERSION = 1
_VERSION_KEY = "memplus_memory_adapter"
_KEYS = {_VERSION_KEY, "base", "model"}
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_WEIGHTS, _LINKED_WEIGHTS = "model.safetensors", "memory-adapter.safetensors"
_TABLE = re.compile(r"table-\d{5}\.safetensors")
# lists of rows that a folder may have
_ROW_LISTS = (ROW_READS_FILE, HOT_ROWS_FILE)


def write_adapter(trained: Path, base: Path, target: Path) -> None:
    """Write the memory layers of ``trained`` as an adapter of ``base``, atomically.

    Raises:
        ConfigError: the memories are not beside feed-forwards, or ``base`` has memories too, or is
            another model; the message names the field.
        CheckpointError: a weight outside the memories has other values than that of ``base``, or a
            folder cannot be read or written.
    """
    model = read_folder(trained)
    check_adds_memories(model.config.model, base)
    _check_weights(trained, base)
    tables = model.config.model.table_names
    sources = {one.name: one for one in model.sources if _is_memory(one.name)}
    weights = [one for name, one in sources.items() if name not in tables]
    content = {
        _VERSION_KEY: FORMAT_VERSION,
        "base": _base_hash(base),
        "model": config_to_json(CheckpointConfig(model.config.model)),
    }
    try:
        with new_folder(target) as made:
            write_tensors(made / _WEIGHTS, weights, _ignore)
            for index, name in enumerate(tables):
                file = made / f"table-{index:05}.safetensors"
                write_tensors(file, [sources[name]], _ignore, with_checksums=True)
            for name in _ROW_LISTS:
                if (trained / name).exists():
                    write_synced(made / name, (trained / name).read_bytes())
            write_synced(made / DESCRIPTION, _json(content))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None


def check_adds_memories(model: ModelConfig, base: Path) -> None:
    """Raise ConfigError unless a model is that of ``base`` with memories beside feed-forwards.

    Raises:
        CheckpointError: the config of ``base`` cannot be read.
    """
    if model.memory is None or model.memory.placement != "beside":
        raise ConfigError("memory.placement: an adapter's memories must be beside feed-forwards")
    plain = read_config(base).model
    if plain.memory_layers:
        raise ConfigError(f"memory_adapter: {base} has memory layers already")
    _check_same(replace(model, memory=None, feed_forward=()), plain, f"the base {base}")


def link_adapter(base: Path, adapter: Path, target: Path) -> None:
    """Make a checkpoint folder of a base and its adapter: links to their files, atomically.

    Raises:
        ConfigError: ``base`` has memories already, or its config is another one.
        CheckpointError: the adapter belongs to another base, or a file is missing, cannot be read
            or does not fit the base.
    """
    base, adapter = base.resolve(), adapter.resolve()
    found, model = _read_description(adapter)
    check_adds_memories(model, base)
    expected = _base_hash(base)
    if found != expected:
        raise CheckpointError(
            f"{adapter / DESCRIPTION}: base: the adapter was made for the weights {found}, but"
            f" those of {base} are {expected}"
        )
    raw = read_json_object(base / _CONFIG) | {"memory": feed_forward_to_json(model)["memory"]}
    tensors = {name: one.file for name, one in list_tensors(base).items()}
    own = _adapter_tensors(adapter)
    dense = {name: file for name, file in own.items() if file.name == _WEIGHTS}
    links = {file.name: file for file in files_of(base)}
    links |= {file.name: file for file in own.values() if file.name != _WEIGHTS}
    links |= {name: adapter / name for name in _ROW_LISTS if (adapter / name).is_file()}
    links[_LINKED_WEIGHTS] = adapter / _WEIGHTS
    weight_map = {name: file.name for name, file in tensors.items()}
    weight_map |= dict.fromkeys(dense, _LINKED_WEIGHTS)
    written = {_CONFIG: raw, _INDEX: {"weight_map": weight_map}}
    try:
        with new_folder(target) as made:
            for name, file in links.items():
                if name not in written:
                    (made / name).symlink_to(file)
            for name, content in written.items():
                write_synced(made / name, _json(content))
            _check_complete(made, base, adapter)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None


def _read_description(adapter: Path) -> tuple[str, ModelConfig]:
    """The hash of the base, and the whole model."""
    path = adapter / DESCRIPTION
    raw = read_json_object(path)
    try:
        for key in raw:
            if key not in _KEYS:
                raise ValueError(f"{key}: unknown key")
        version = typed(_VERSION_KEY, raw.get(_VERSION_KEY), int)
        if version != FORMAT_VERSION:
            raise ValueError(f"{_VERSION_KEY}: {version} is not supported")
        base, model = typed("base", raw.get("base"), str), typed("model", raw.get("model"), dict)
        return base, parse_model(model)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _adapter_tensors(adapter: Path) -> dict[str, Path]:
    """Files by names of tensors; other tensors than an adapter's would change the base."""
    if (adapter / _INDEX).exists():
        raise CheckpointError(f"{adapter / _INDEX}: a memory adapter has no index")
    found = list_tensors(adapter)
    for name, one in found.items():
        is_known = one.file.name == _WEIGHTS or _TABLE.fullmatch(one.file.name)
        if not (_is_memory(name) and is_known):
            raise CheckpointError(f"{one.file}: tensor {name} is not part of a memory adapter")
    return {name: one.file for name, one in found.items()}


def _check_complete(made: Path, base: Path, adapter: Path) -> None:
    try:
        open_checkpoint(made)
    except CheckpointError as error:
        text = str(error).replace(str(made), str(adapter))
        raise CheckpointError(f"{text}; the adapter does not fit {base}") from None


def _base_hash(base: Path) -> str:
    return weights_hash(open_checkpoint(base)[1].values())


def _check_weights(trained: Path, base: Path) -> None:
    """Raise CheckpointError unless all weights outside memories have the base's values."""
    found = open_checkpoint(trained)[1]
    for name, one in open_checkpoint(base)[1].items():
        values, wanted = read_mapped(found[name]), read_mapped(one)
        if not torch.equal(values.double(), wanted.double()):
            raise CheckpointError(
                f"{trained}: tensor {name} has other values than in {base}; an adapter holds"
                " memory layers alone"
            )


def _check_same(model: ModelConfig, plain: ModelConfig, owner: str) -> None:
    for field in fields(ModelConfig):
        ours, theirs = getattr(model, field.name), getattr(plain, field.name)
        if ours != theirs:
            raise ConfigError(
                f"{field.name}: is {ours} with the adapter's memories, but {theirs} in {owner}"
            )


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _is_memory(name: str) -> bool:
    """Whether a tensor belongs to a memory layer, or is a table."""
    return name.startswith("memory.") or ".memory." in name


def _ignore(num_bytes: int) -> None:
    """Discards progress reports."""
