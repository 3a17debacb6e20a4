"""Reads the model settings of sparse-memory-lm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.model.config import MemoryConfig, ModelConfig
from weights.checkpoints.importers.model_settings import refuse_unknown, required
from weights.checkpoints.json_fields import MAX_LAYERS, typed

# our field by the run's key, for keys whose meaning is the same
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "ffn_hidden": "intermediate_size",
    "max_seq_len": "max_positions",
}
_NUMBERS = {"rope_theta": "rope_theta", "norm_eps": "rms_norm_eps"}
_MEMORY_SIZES = {
    "mem_heads": "num_heads",
    "mem_n_keys": "num_subkeys",
    "mem_knn": "top_k",
    "mem_k_dim": "query_dim",
}
_CHOICES = {"mem_query_norm": "batchnorm", "mem_score_scale": "learned"}
_MEMORY_KEYS = {
    *(*_MEMORY_SIZES, *_CHOICES),
    *("mem_layers", "mem_v_dim", "mem_swilu", "mem_share_values"),
}
# they say how the model is trained or computed, not what it computes
_IGNORED = {
    *("init_std", "mem_value_impl", "mem_value_grad", "mem_impl"),
    *("mem_keys_weight_decay", "mem_score_scale_init"),
}


@dataclass(frozen=True)
class SparseMemoryConfig:
    """The model, and parts of its queries that are folded into their weights.

    Attributes:
        has_query_norm: queries have a batch norm.
        has_score_scale: each head's scores have a learned factor.
    """

    model: ModelConfig
    has_query_norm: bool = False
    has_score_scale: bool = False


def parse_settings(raw: Mapping[str, Any]) -> SparseMemoryConfig:
    """The model that a ``model_config`` describes.

    Raises:
        ValueError: a key is unknown, missing or not supported; the message begins with the key.
    """
    refuse_unknown(raw, {*_SIZES, *_NUMBERS, *_MEMORY_KEYS, *_IGNORED})
    values = {ours: required(raw, key, int) for key, ours in _SIZES.items()}
    values |= {ours: required(raw, key, float) for key, ours in _NUMBERS.items()}
    hidden_size, num_heads = values["hidden_size"], values["num_heads"]
    if not 0 < num_heads <= hidden_size or hidden_size % num_heads:
        raise ValueError(f"n_heads: {num_heads} does not divide d_model {hidden_size}")
    if values["num_layers"] > MAX_LAYERS:
        raise ValueError(f"n_layers: {values['num_layers']} is more than {MAX_LAYERS}")
    layers = _layers(raw, values["num_layers"])
    kind = "memory_plus" if required(raw, "mem_swilu", bool) else "pkm"
    model = ModelConfig(
        **values,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        tie_embeddings=True,
        feed_forward=tuple(
            kind if layer in layers else "dense" for layer in range(values["num_layers"])
        ),
        memory=_memory(raw, kind, hidden_size) if layers else None,
    )
    return SparseMemoryConfig(model, *(_is_chosen(raw, key) for key in _CHOICES))


def _layers(raw: Mapping[str, Any], num_layers: int) -> set[int]:
    layers = required(raw, "mem_layers", list)
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise ValueError(f"mem_layers: {layer!r:.100} is not one of the {num_layers} layers")
    return set(layers)


def _memory(raw: Mapping[str, Any], kind: str, hidden_size: int) -> MemoryConfig:
    if not required(raw, "mem_share_values", bool):
        raise ValueError("mem_share_values: false is not supported")
    value_dim = typed("mem_v_dim", raw.get("mem_v_dim", -1), int)
    return MemoryConfig(
        **{ours: required(raw, key, int) for key, ours in _MEMORY_SIZES.items()},
        value_dim=hidden_size if value_dim == -1 else value_dim,
        value_projection=kind == "pkm" and value_dim > 0,
    )


def _is_chosen(raw: Mapping[str, Any], key: str) -> bool:
    choice, found = _CHOICES[key], required(raw, key, str)
    if found not in ("none", choice):
        raise ValueError(f"{key}: {found!r:.100} is neither none nor {choice}")
    return bool(found == choice)
