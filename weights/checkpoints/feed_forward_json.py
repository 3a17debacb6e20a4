"""The keys of config.json for memory layers and experts."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from engine.model.config import MemoryConfig, MixtureConfig, ModelConfig
from weights.checkpoints.json_fields import typed
from weights.nearest_name import suggestion

# Mixtral's key -> (our field, its type)
_MIXTURE: dict[str, tuple[str, type]] = {
    "num_local_experts": ("num_experts", int),
    "num_experts_per_tok": ("top_k", int),
    "router_aux_loss_coef": ("router_loss_weight", float),
}
# memplus's additions: by default all layers but memory layers are mixtures of full width
_MOE_LAYERS, _EXPERT_SIZE = "moe_layers", "moe_intermediate_size"
FEED_FORWARD_KEYS = {*_MIXTURE, _MOE_LAYERS, _EXPERT_SIZE, "memory"}


def feed_forward_to_json(model: ModelConfig) -> dict[str, Any]:
    """The keys that ``parse_feed_forward`` reads; omits keys that the model does not use."""
    raw: dict[str, Any] = {}
    if model.mixture is not None:
        raw |= {key: getattr(model.mixture, name) for key, (name, _) in _MIXTURE.items()}
        raw[_EXPERT_SIZE] = model.mixture.expert_size
        raw[_MOE_LAYERS] = [i for i, kind in enumerate(model.feed_forward) if kind == "moe"]
    if model.memory is not None:
        layers = {str(layer): model.feed_forward[layer] for layer in model.memory_layers}
        raw["memory"] = {"layers": layers, **asdict(model.memory)}
    return raw


def parse_feed_forward(
    raw: Mapping[str, Any], num_layers: int, intermediate_size: int
) -> dict[str, Any]:
    """Fields of ``ModelConfig``: ``feed_forward``, ``memory`` and ``mixture``.

    Raises:
        ValueError: a key is unknown, missing or has an invalid value; the message begins with it.
    """
    kinds = ["dense"] * num_layers
    values: dict[str, Any] = {}
    if raw.get("memory") is not None:
        values["memory"] = _parse_memory(raw["memory"], kinds)
    mixture = {key: raw[key] for key in (*_MIXTURE, _MOE_LAYERS, _EXPERT_SIZE) if key in raw}
    if mixture:
        values["mixture"] = _parse_mixture(mixture, kinds, intermediate_size)
    return {"feed_forward": tuple(kinds), **values}


def _parse_memory(raw: object, kinds: list[str]) -> MemoryConfig:
    values = dict(typed("memory", raw, dict))
    layers = typed("memory.layers", values.pop("layers", None), dict)
    types = {field.name: field.type for field in fields(MemoryConfig)}
    required = {field.name for field in fields(MemoryConfig) if field.default is MISSING}
    for key in values:
        if key not in types:
            raise ValueError(f"memory.{key}: unknown key{suggestion(key, [*types, 'layers'])}")
    for key in sorted(required - set(values)):
        raise ValueError(f"memory.{key}: missing")
    for key, value in values.items():
        kind = types[key]
        assert isinstance(kind, type)  # MemoryConfig has no string or union annotations
        typed(f"memory.{key}", value, kind)
    for layer, kind_name in layers.items():
        if not (layer.isascii() and layer.isdigit() and int(layer) < len(kinds)):
            raise ValueError(f"memory.layers: {layer!r} is not a layer; there are {len(kinds)}")
        kinds[int(layer)] = typed(f"memory.layers.{layer}", kind_name, str)
    try:
        return MemoryConfig(**values)
    except ValueError as error:
        raise ValueError(f"memory.{error}") from None


def _parse_mixture(
    raw: Mapping[str, Any], kinds: list[str], intermediate_size: int
) -> MixtureConfig:
    values: dict[str, Any] = {"expert_size": intermediate_size}
    for key, (name, kind) in _MIXTURE.items():
        if raw.get(key) is not None:
            values[name] = typed(key, raw[key], kind)
    for key in ("num_local_experts", "num_experts_per_tok"):
        if _MIXTURE[key][0] not in values:
            raise ValueError(f"{key}: missing")
    if raw.get(_EXPERT_SIZE) is not None:
        values["expert_size"] = typed(_EXPERT_SIZE, raw[_EXPERT_SIZE], int)
    layers = raw.get(_MOE_LAYERS)
    if layers is None:
        layers = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
    for layer in typed(_MOE_LAYERS, layers, list):
        if not 0 <= typed(_MOE_LAYERS, layer, int) < len(kinds):
            raise ValueError(f"{_MOE_LAYERS}: {layer} is not a layer; there are {len(kinds)}")
        if kinds[layer] != "dense":
            raise ValueError(f"{_MOE_LAYERS}: layer {layer} is already {kinds[layer]}")
        kinds[layer] = "moe"
    return MixtureConfig(**values)
