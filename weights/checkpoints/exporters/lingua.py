"""Writes a checkpoint folder as facebookresearch/memory's consolidated files."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.importers.lingua_files import PARAMS, WEIGHTS
from weights.checkpoints.importers.lingua_names import LAYER, TIED_HEAD, TOP
from weights.checkpoints.importers.rotary_lanes import pair_neighbours
from weights.checkpoints.new_folder import new_folder, write_synced
from weights.checkpoints.tensor_files import DTYPES, StoredTensor, read_mapped
from weights.checkpoints.tokenizer import TOKENIZER_FILES
from weights.errors import CheckpointError

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def export_lingua(source: Path, target: Path) -> None:
    """Write a checkpoint folder's model into the new folder ``target``.

    ``target/consolidated`` gets the weights, in their dtypes, and ``params.json``;
    ``target/tokenizer`` gets the tokenizer. A shared table is stored under the first memory layer,
    as the repository does. ``memplus convert`` reads the tensors back, bit for bit. Copies of all
    query and key weights are held in memory.

    Raises:
        CheckpointError: the folder is not a model, or ``target`` exists or cannot be written.
        ConfigError: the repository has no such model; the message names the field of config.json.
    """
    config, stored = open_checkpoint(source)
    _check(config, stored)
    if target.exists():
        raise CheckpointError(f"{target}: exists already")
    tensors = {_their_name(name, config.model): one for name, one in stored.items()}
    weights = {name: _reordered(name, one, config.model) for name, one in tensors.items()}
    if config.model.tie_embeddings:
        weights[TIED_HEAD] = weights["tok_embeddings.weight"]  # torch.save writes it once
    try:
        with new_folder(target) as folder:
            (folder / "consolidated").mkdir()
            with open(folder / "consolidated" / WEIGHTS, "xb") as file:
                torch.save({"model": weights}, file)
                file.flush()
                os.fsync(file.fileno())
            params = json.dumps({"model": _params(config.model)}, indent=1) + "\n"
            write_synced(folder / "consolidated" / PARAMS, params.encode())
            (folder / "tokenizer").mkdir()
            for name in TOKENIZER_FILES:
                if (source / name).exists():
                    write_synced(folder / "tokenizer" / name, (source / name).read_bytes())
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        raise CheckpointError(f"{target}: cannot be written ({error!s:.200})") from None


def _check(config: CheckpointConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Raise ConfigError if the repository has no such model."""
    model, memory = config.model, config.model.memory
    refused = {
        "quantization_config": config.has_groups,
        "rope_scaling": model.rope_scaling is not None,
        "attention_bias": model.attention_bias or model.qkv_bias,
        "qk_norm": model.qk_norm,
        "mlp_bias": model.mlp_bias,
        "num_local_experts": model.mixture is not None,
        "memory.qk_norm": memory is not None and memory.qk_norm,
        "memory.placement": memory is not None and memory.placement != "replace",
        "memory.scalar_gate": memory is not None and memory.scalar_gate,
        "memory.layers": len({model.feed_forward[i] for i in model.memory_layers}) > 1,
        "memory.table": any(stored[name].dtype not in DTYPES for name in model.table_names),
    }
    for field, is_refused in refused.items():
        if is_refused:
            few_bits = field in ("quantization_config", "memory.table")
            advice = "; `memplus convert --dtype` makes them dense" if few_bits else ""
            raise ConfigError(f"{field}: facebookresearch/memory has no such models{advice}")


def _their_name(name: str, model: ModelConfig) -> str:
    by_ours = {ours: theirs for theirs, ours in TOP.items()}
    if name in by_ours:
        return by_ours[name]
    is_peer = "peer" in model.feed_forward
    parts = {ours: theirs for theirs, ours in LAYER.items() if "values_v" not in theirs}
    if is_peer:
        parts["memory.table"] = "feed_forward.values_v.weight"
    match = _LAYER_NAME.fullmatch(name)
    layer, part = (match[1], match[2]) if match else (str(model.memory_layers[0]), name)
    return f"layers.{layer}.{parts[part]}"


def _reordered(name: str, stored: StoredTensor, model: ModelConfig) -> Tensor:
    tensor = read_mapped(stored)
    if name.endswith(".wq.weight"):
        return pair_neighbours(tensor, model.num_heads)
    if name.endswith(".wk.weight"):
        return pair_neighbours(tensor, model.num_kv_heads)
    if name.endswith(".keys"):
        return tensor.flatten(0, 2)
    return tensor


def _params(model: ModelConfig) -> dict[str, Any]:
    """The ``model`` of params.json."""
    hidden_size, size = model.hidden_size, model.intermediate_size
    default = int(2 * (4 * hidden_size) / 3)
    # the width is a product rounded up to a multiple: one of the two is enough
    is_wider = size >= default
    params: dict[str, Any] = {
        "dim": hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_heads,
        "n_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "ffn_dim_multiplier": None if is_wider else (size + 0.5) / default,
        "multiple_of": size if is_wider else 1,
        "norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "max_seqlen": model.max_positions,
        "vocab_size": model.vocab_size,
        "weight_tying": model.tie_embeddings,
    }
    memory = model.memory
    if memory is None:
        return params
    kind = model.feed_forward[model.memory_layers[0]]
    is_projected = kind == "pkm" and memory.value_projection
    is_default = memory.value_dim == hidden_size and not is_projected
    params["productkey_args"] = {
        "is_enabled": True,
        "layers": ",".join(map(str, model.memory_layers)),
        "mem_n_keys": memory.num_subkeys,
        "mem_heads": memory.num_heads,
        "mem_knn": memory.top_k,
        "mem_share_values": memory.share_values,
        "mem_k_dim": memory.query_dim,
        "mem_v_dim": -1 if is_default else memory.value_dim,
        "swilu_projection": kind == "memory_plus",
        "mem_gated": memory.output_gate,
        "peer_variant": kind == "peer",
    }
    return params
