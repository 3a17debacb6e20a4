"""Reads ``params.json`` of a run of facebookresearch/memory, which is built on lingua."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.model.config import MemoryConfig, ModelConfig
from weights.checkpoints.importers.model_settings import refuse_unknown, required
from weights.checkpoints.json_fields import MAX_LAYERS, typed
from weights.errors import CheckpointError
from weights.text_files import read_json_object

# our field by the run's key, for keys whose meaning is the same
_SIZES = {"dim": "hidden_size", "n_layers": "num_layers", "vocab_size": "vocab_size"}
_MEMORY_SIZES = {
    "mem_heads": "num_heads",
    "mem_n_keys": "num_subkeys",
    "mem_knn": "top_k",
    "mem_k_dim": "query_dim",
}
_FLAGS = ("mem_share_values", "swilu_projection", "mem_gated", "peer_variant")
_MODEL_KEYS = {
    *(*_SIZES, "n_heads", "n_kv_heads", "head_dim", "ffn_dim_multiplier", "multiple_of"),
    *("norm_eps", "rope_theta", "max_seqlen", "weight_tying", "productkey_args"),
}
_MEMORY_KEYS = {*_MEMORY_SIZES, *_FLAGS, "is_enabled", "layers", "mem_v_dim"}
# they say how training began, not what the model computes
_TRAINING_KEYS = {"seed", "init_base_std", "init_std_factor", "value_fixed_lr"}
# keys that are accepted without a value only
_UNSUPPORTED = {"sliding_window"}
_LARGEST_WIDTH = 2**24


def read_params(path: Path) -> ModelConfig:
    """The model that a ``params.json`` describes.

    Raises:
        CheckpointError: the file cannot be read, or a key is unknown, missing or not supported.
    """
    raw = read_json_object(path)
    try:
        return _model(typed("model", raw.get("model"), dict))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _model(raw: Mapping[str, Any]) -> ModelConfig:
    raw = _given(raw, _MODEL_KEYS)
    values = {ours: required(raw, key, int) for key, ours in _SIZES.items()}
    hidden_size = values["hidden_size"]
    num_heads, head_dim = _heads(raw, hidden_size)
    if values["num_layers"] > MAX_LAYERS:
        raise ValueError(f"n_layers: {values['num_layers']} is more than {MAX_LAYERS}")
    kinds = ["dense"] * values["num_layers"]
    memory = _memory(raw.get("productkey_args"), kinds, hidden_size)
    return ModelConfig(
        **values,
        intermediate_size=_feed_forward_size(raw, hidden_size),
        num_heads=num_heads,
        num_kv_heads=typed("n_kv_heads", raw.get("n_kv_heads", num_heads), int),
        head_dim=head_dim,
        max_positions=required(raw, "max_seqlen", int),
        rms_norm_eps=required(raw, "norm_eps", float),
        rope_theta=required(raw, "rope_theta", float),
        tie_embeddings=typed("weight_tying", raw.get("weight_tying", False), bool),
        feed_forward=tuple(kinds),
        memory=memory,
    )


def _heads(raw: Mapping[str, Any], hidden_size: int) -> tuple[int, int]:
    """Number and width of the heads; either follows from the other."""
    given = {key: required(raw, key, int) for key in ("n_heads", "head_dim") if key in raw}
    for key, value in given.items():
        if value < 1:
            raise ValueError(f"{key}: {value} is not positive")
    if not given:
        raise ValueError("n_heads: missing, and so is head_dim")
    num_heads: int = given.get("n_heads") or hidden_size // given["head_dim"]
    head_dim: int = given.get("head_dim") or hidden_size // num_heads
    if not 0 < num_heads * head_dim <= _LARGEST_WIDTH:
        raise ValueError(f"n_heads: {num_heads} heads of {head_dim} are not supported")
    return num_heads, head_dim


def _feed_forward_size(raw: Mapping[str, Any], hidden_size: int) -> int:
    size = int(2 * (4 * hidden_size) / 3)
    if "ffn_dim_multiplier" in raw:
        multiplier = typed("ffn_dim_multiplier", raw["ffn_dim_multiplier"], float)
        if not 0 < multiplier <= 2**16:
            raise ValueError(f"ffn_dim_multiplier: {multiplier} is not between 0 and 65536")
        size = int(multiplier * size)
    multiple = required(raw, "multiple_of", int)
    rounded: int = -(-size // max(1, multiple)) * multiple
    if not 0 < rounded <= _LARGEST_WIDTH:
        raise ValueError(f"multiple_of: no feed-forward of {size} rounded up to {multiple}")
    return rounded


def _memory(raw: object, kinds: list[str], hidden_size: int) -> MemoryConfig | None:
    """The memory's options; writes the kinds of its layers into ``kinds``."""
    if raw is None:
        return None
    given = _given(typed("productkey_args", raw, dict), _MEMORY_KEYS)
    if not typed("is_enabled", given.get("is_enabled", False), bool):
        return None
    shares, has_gate, has_output_gate, is_peer = (required(given, key, bool) for key in _FLAGS)
    kind = "peer" if is_peer else "memory_plus" if has_gate else "pkm"
    for layer in typed("layers", given.get("layers"), str).split(","):
        number = layer.strip()
        if not (number.isascii() and number.isdigit() and int(number) < len(kinds)):
            raise ValueError(f"layers: {number!r} is not one of the {len(kinds)} layers")
        kinds[int(number)] = kind
    value_dim = typed("mem_v_dim", given.get("mem_v_dim", -1), int)
    return MemoryConfig(
        **{ours: required(given, key, int) for key, ours in _MEMORY_SIZES.items()},
        value_dim=hidden_size if value_dim == -1 else value_dim,
        share_values=shares,
        value_projection=kind == "pkm" and value_dim > 0,
        output_gate=has_output_gate,
    )


def _given(raw: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The keys that have a value, without those that say nothing about the model."""
    for key, value in raw.items():
        if key in _UNSUPPORTED and value is not None:
            raise ValueError(f"{key}: {value!r:.100} is not supported")
    refuse_unknown(raw, known | _TRAINING_KEYS | _UNSUPPORTED)
    return {key: value for key, value in raw.items() if value is not None and key in known}
