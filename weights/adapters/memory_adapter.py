"""Memory adapters: folders with the memory layers that were trained beside a finished model.

An adapter folder has ``memory_adapter.json``, which names its base by the hash of the base's
weights, the memory layers' weights in ``model.safetensors``, and ``table-*.safetensors``. Together
with its base it is a checkpoint folder.
"""

import json
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from weights.adapters.adapter_files import DESCRIPTION
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.config_json import parse_model
from weights.checkpoints.convert import read_folder
from weights.checkpoints.feed_forward_json import feed_forward_to_json
from weights.checkpoints.json_fields import typed
from weights.checkpoints.new_folder import new_folder, write_synced
from weights.checkpoints.tensor_files import list_tensors
from weights.checkpoints.tensor_writer import write_tensors
from weights.checkpoints.weights_hash import weights_hash
from weights.errors import CheckpointError
from weights.text_files import read_json_object

FORMAT_VERSION = 1
_VERSION_KEY = "memplus_memory_adapter"
_KEYS = {_VERSION_KEY, "base", "memory"}
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_WEIGHTS, _LINKED_WEIGHTS = "model.safetensors", "memory-adapter.safetensors"


def write_adapter(trained: Path, base: Path, target: Path) -> None:
    """Write the memory layers of ``trained`` as an adapter of ``base``, atomically.

    ``trained`` is a checkpoint folder whose other weights have the values of ``base``.

    Raises:
        ConfigError: the memories are not beside feed-forwards, or ``base`` has memories too.
        CheckpointError: a folder cannot be read or written.
    """
    model = read_folder(trained)
    _check_beside(model.config.model)
    tables = model.config.model.table_names
    sources = {one.name: one for one in model.sources if _is_memory(one.name)}
    weights = [one for name, one in sources.items() if name not in tables]
    memory = feed_forward_to_json(model.config.model)["memory"]
    content = {_VERSION_KEY: FORMAT_VERSION, "base": _base_hash(base), "memory": memory}
    try:
        with new_folder(target) as made:
            write_tensors(made / _WEIGHTS, weights, _ignore)
            for index, name in enumerate(tables):
                file = made / f"table-{index:05}.safetensors"
                write_tensors(file, [sources[name]], _ignore, with_checksums=True)
            write_synced(made / DESCRIPTION, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None


def link_adapter(base: Path, adapter: Path, target: Path) -> None:
    """Make a checkpoint folder of a base and its adapter: links to their files, atomically.

    Raises:
        ConfigError: ``base`` has memories already.
        CheckpointError: the adapter belongs to another base, or a file is missing, cannot be read
            or does not fit the base.
    """
    base, adapter = base.resolve(), adapter.resolve()
    found, memory = _read_description(adapter)
    expected = _base_hash(base)
    if found != expected:
        raise CheckpointError(
            f"{adapter / DESCRIPTION}: base: the adapter was made for the weights {found}, but"
            f" those of {base} are {expected}"
        )
    raw = read_json_object(base / _CONFIG) | {"memory": memory}
    try:
        _check_beside(parse_model(raw))
    except ValueError as error:
        raise CheckpointError(f"{adapter / DESCRIPTION}: {error}") from None
    tensors = {name: one.file for name, one in list_tensors(base).items()}
    own = {name: one.file for name, one in list_tensors(adapter).items() if _is_memory(name)}
    dense = {name: file for name, file in own.items() if file.name == _WEIGHTS}
    links = {file.name: file for file in base.iterdir() if file.is_file()}
    links |= {file.name: file for file in set(own.values()) - set(dense.values())}
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
                write_synced(made / name, (json.dumps(content, indent=2) + "\n").encode())
            open_checkpoint(made)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None


def _read_description(adapter: Path) -> tuple[str, dict[str, Any]]:
    """The hash of the base, and the memory section of config.json."""
    path = adapter / DESCRIPTION
    raw = read_json_object(path)
    try:
        for key in raw:
            if key not in _KEYS:
                raise ValueError(f"{key}: unknown key")
        version = typed(_VERSION_KEY, raw.get(_VERSION_KEY), int)
        if version != FORMAT_VERSION:
            raise ValueError(f"{_VERSION_KEY}: {version} is not supported")
        base, memory = typed("base", raw.get("base"), str), typed("memory", raw.get("memory"), dict)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return base, memory


def _base_hash(base: Path) -> str:
    config, stored = open_checkpoint(base)
    if config.model.memory_layers:
        raise ConfigError(f"memory_adapter: {base} has memory layers already")
    return weights_hash(stored.values())


def _check_beside(model: ModelConfig) -> None:
    if model.memory is None or model.memory.placement != "beside":
        raise ConfigError("memory.placement: an adapter's memories must be beside feed-forwards")


def _is_memory(name: str) -> bool:
    """Whether a tensor belongs to a memory layer, or is a table."""
    return name.startswith("memory.") or ".memory." in name


def _ignore(num_bytes: int) -> None:
    """Progress is not shown."""
