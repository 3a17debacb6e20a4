"""The keys of config.json for rotary embeddings."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.model.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from weights.checkpoints.json_fields import typed

_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
# YaRN's keys that may be missing -> their types
_YARN: dict[str, type] = {
    "beta_fast": float,
    "beta_slow": float,
    "attention_factor": float,
    "truncate": bool,
}


def rope_to_json(scaling: RopeScaling) -> dict[str, Any]:
    """The value of ``rope_scaling`` that ``parse_rope`` reads."""
    kinds = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
    values = {key: value for key, value in asdict(scaling).items() if value is not None}
    if "original_max_position" in values:
        values[_ORIGINAL] = values.pop("original_max_position")
    return {"rope_type": kinds[type(scaling)], **values}


def parse_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``ModelConfig``: ``rope_theta`` and ``rope_scaling``, if they are given.

    Raises:
        ValueError: a kind or a key is not supported; the message begins with ``rope_scaling``.
    """
    # transformers 5 writes rope_parameters instead of rope_theta and rope_scaling
    values: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        scaling = dict(typed(key, raw.get(key) or {}, dict))
        if "rope_theta" in scaling:
            values["rope_theta"] = typed("rope_theta", scaling.pop("rope_theta"), float)
        old_name = scaling.pop("type", "default")
        scaling.setdefault("rope_type", old_name)
        if raw.get(key):
            found.append(scaling)
    if not found:
        return {}
    if found[0] != found[-1]:
        raise ValueError("rope_scaling: differs from rope_parameters")
    scaling = {key: value for key, value in found[0].items() if value is not None}
    kind = scaling.pop("rope_type")
    if scaling.get("partial_rotary_factor") == 1:
        del scaling["partial_rotary_factor"]
    if "factor" in scaling:
        typed("rope_scaling.factor", scaling["factor"], float)
    if kind in ("linear", "dynamic") and scaling == {"factor": 1}:
        return values  # positions are divided by 1
    if kind == "default" and not scaling:
        return values
    return values | {"rope_scaling": _scaling(kind, scaling, raw)}


def _scaling(kind: object, given: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeScaling:
    known = {"linear": {"factor"}, "llama3": {*_LLAMA3}, "yarn": {"factor", _ORIGINAL, *_YARN}}
    if not isinstance(kind, str) or kind not in known or not set(given) <= known[kind]:
        raise ValueError(f"rope_scaling: {kind!r} with {sorted(given)} is not supported")
    if kind == "llama3" and set(given) != known[kind]:
        raise ValueError(f"rope_scaling: llama3 requires {', '.join(_LLAMA3)}")
    if "factor" not in given:
        raise ValueError(f"rope_scaling: {kind} requires factor")
    types = dict.fromkeys(_LLAMA3, float) | _YARN
    named = {key: typed(f"rope_scaling.{key}", value, types[key]) for key, value in given.items()}
    if kind == "linear":
        return LinearScaling(named["factor"])
    # Hugging Face's default
    original = int(named.pop(_ORIGINAL, raw.get("max_position_embeddings", 2048)))
    if kind == "llama3":
        return Llama3Scaling(**named, original_max_position=original)
    return YarnScaling(**named, original_max_position=original)
