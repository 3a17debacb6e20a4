"""Reads and writes config.json, strictly: Hugging Face's keys and memplus's additions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.model.config import ModelConfig
from weights.checkpoints.config_keys import (
    FIXED_VALUES,
    FORMAT_VERSION,
    IGNORED_KEYS,
    QUANTIZATION,
    QUANTIZATION_KEY,
    check_values,
)
from weights.checkpoints.families import LLAMA, MIXTRAL, family_of, named_family
from weights.checkpoints.feed_forward_json import (
    FEED_FORWARD_KEYS,
    feed_forward_to_json,
    parse_feed_forward,
)
from weights.checkpoints.json_fields import MAX_LAYERS, typed
from weights.checkpoints.rope_json import parse_rope, rope_to_json
from weights.checkpoints.window_json import WINDOW_KEYS, parse_window
from weights.errors import CheckpointError
from weights.nearest_name import suggestion
from weights.text_files import read_json_object

# Hugging Face's key -> (our field, its type). A missing key gets Hugging Face's default.
_FIELDS: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("intermediate_size", int),
    "num_hidden_layers": ("num_layers", int),
    "num_attention_heads": ("num_heads", int),
    "num_key_value_heads": ("num_kv_heads", int),
    "head_dim": ("head_dim", int),
    "max_position_embeddings": ("max_positions", int),
    "rms_norm_eps": ("rms_norm_eps", float),
    "rope_theta": ("rope_theta", float),
    "tie_word_embeddings": ("tie_embeddings", bool),
    "attention_bias": ("attention_bias", bool),
    "mlp_bias": ("mlp_bias", bool),
}
_REQUIRED = tuple(_FIELDS)[:5]
# all keys that affect the model and may have several values
MODEL_KEYS = frozenset(
    {*_FIELDS, *WINDOW_KEYS, *FEED_FORWARD_KEYS}
    | {"architectures", "model_type", "rope_scaling", "rope_parameters"}
)


@dataclass(frozen=True)
class CheckpointConfig:
    """Content of a folder's configuration files.

    Attributes:
        model: shapes and layer kinds.
        eos_ids: token ids that end a text.
        bos_id: token id that begins a text; None if there is none.
        dtype: the dtype that the file names for the weights.
        has_groups: whether weights are in groups of 8 or 4 bits.
    """

    model: ModelConfig
    eos_ids: frozenset[int] = frozenset()
    bos_id: int | None = None
    dtype: str | None = None
    has_groups: bool = False


def read_config(folder: Path) -> CheckpointConfig:
    """Read ``config.json`` (and ``generation_config.json`` for the end-of-sequence ids).

    Raises:
        CheckpointError: a key is unknown, missing or of the wrong type, or requires an unsupported
            feature.
    """
    path = folder / "config.json"
    raw = read_json_object(path)
    generation = folder / "generation_config.json"
    eos = read_json_object(generation).get("eos_token_id") if generation.exists() else None
    try:
        return _parse(raw, raw.get("eos_token_id") if eos is None else eos)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_model(raw: Mapping[str, Any]) -> ModelConfig:
    """The model that the content of a ``config.json`` describes.

    Raises:
        ValueError: as ``read_config``; the message begins with the key.
    """
    return _parse(raw, raw.get("eos_token_id")).model


def is_known_key(key: str) -> bool:
    """Whether ``read_config`` accepts a key: it affects the model, has a fixed value or neither."""
    return key in MODEL_KEYS or key in FIXED_VALUES or key in IGNORED_KEYS


def config_to_json(config: CheckpointConfig) -> dict[str, Any]:
    """The content of a ``config.json`` that ``read_config`` reads back."""
    model = config.model
    family = family_of(model)
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "memplus_format": FORMAT_VERSION,
    }
    used = (key for key in _FIELDS if key not in family.unused)
    raw |= {key: getattr(model, _FIELDS[key][0]) for key in used}
    raw |= {"bos_token_id": config.bos_id, "eos_token_id": sorted(config.eos_ids) or None}
    raw["torch_dtype"] = config.dtype
    if model.rope_scaling is not None:
        raw["rope_scaling"] = rope_to_json(model.rope_scaling)
    if config.has_groups:
        raw[QUANTIZATION_KEY] = QUANTIZATION
    return raw | feed_forward_to_json(model)


def _parse(raw: Mapping[str, Any], eos: object) -> CheckpointConfig:
    named = named_family(raw)
    family = named or LLAMA
    # a null means that a key is not given, and overrides a family's default
    raw = {key: value for key, value in {**family.defaults, **raw}.items() if value is not None}
    for key in raw:
        if not is_known_key(key):
            near = suggestion(key, MODEL_KEYS)
            raise ValueError(f"{key}: unknown key; it may change the model's output{near}")
    values: dict[str, Any] = {}
    for key, (name, kind) in _FIELDS.items():
        if key in family.unused:
            continue
        if raw.get(key) is not None:
            values[name] = _field(key, raw[key], kind)
        elif key in _REQUIRED:
            raise ValueError(f"{key}: missing")
    check_values(raw)
    values.setdefault("num_kv_heads", values["num_heads"])
    values.setdefault("head_dim", values["hidden_size"] // max(values["num_heads"], 1))
    values.setdefault("max_positions", 2048)
    values.setdefault("rms_norm_eps", 1e-6)
    window = parse_window(raw, values["num_layers"])
    values["max_positions"] = min(values["max_positions"], window or values["max_positions"])
    values |= family.model
    values |= parse_rope(raw)
    values |= parse_feed_forward(raw, values["num_layers"], values["intermediate_size"])
    if named is MIXTRAL and "mixture" not in values:
        raise ValueError("num_local_experts: missing, but the model is a mixtral")
    if named not in (MIXTRAL, None) and "mixture" in values:
        raise ValueError(
            f"model_type: must be mixtral if there are experts, not {family.model_type}"
        )
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    bos_ids = _ids("bos_token_id", raw.get("bos_token_id"))
    return CheckpointConfig(
        model=ModelConfig(**values),
        eos_ids=_ids("eos_token_id", eos),
        bos_id=min(bos_ids, default=None),
        dtype=typed("dtype", dtype, str) if dtype is not None else None,
        has_groups=QUANTIZATION_KEY in raw,
    )


def _field(key: str, value: object, kind: type) -> Any:
    found = typed(key, value, kind)
    if kind is not bool and not found > 0:
        raise ValueError(f"{key}: must be greater than 0, not {found}")
    if key == "num_hidden_layers" and found > MAX_LAYERS:
        raise ValueError(f"{key}: {found} is more than {MAX_LAYERS}")
    return found


def _ids(key: str, value: object) -> frozenset[int]:
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    return frozenset(typed(key, token_id, int) for token_id in ids)
