"""Families of models: what ``model_type`` means for the other keys of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.model.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face.

    Attributes:
        model_type: its name.
        architecture: name of the class of its language model.
        defaults: values of keys that are not given, if they differ from Llama's.
        model: fields of ``ModelConfig`` that the family sets.
        unused: keys that other families use and this one does not.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, bool] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


_BIASES = frozenset({"attention_bias", "mlp_bias"})
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
LLAMA = Family("llama", "LlamaForCausalLM")
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    {
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    unused=_BIASES,
)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _QWEN, {"qkv_bias": True}, _BIASES)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    {**_QWEN, "head_dim": 128},
    {"qk_norm": True},
    frozenset({"mlp_bias"}),
)
FAMILIES = {one.model_type: one for one in (LLAMA, MIXTRAL, MISTRAL, QWEN2, QWEN3)}


def family_of(model: ModelConfig) -> Family:
    """The family in whose keys a model is written."""
    if model.mixture is not None:
        return MIXTRAL
    return QWEN2 if model.qkv_bias else QWEN3 if model.qk_norm else LLAMA


def named_family(raw: Mapping[str, Any]) -> Family | None:
    """The family that ``model_type`` or ``architectures`` names; None if neither is given.

    Raises:
        ValueError: it is unknown, or they differ; the message begins with the key.
    """
    found: list[Family] = []
    if (model_type := raw.get("model_type")) is not None:
        found.append(_known("model_type", model_type, FAMILIES))
    if (classes := raw.get("architectures")) is not None:
        if not isinstance(classes, list) or len(classes) != 1:
            raise ValueError(f"architectures: must be a list of one class, not {classes!r}")
        by_class = {family.architecture: family for family in FAMILIES.values()}
        found.append(_known("architectures", classes[0], by_class))
    if found and found[0] is not found[-1]:
        family = found[0].model_type
        raise ValueError(f"architectures: {found[-1].architecture} is no class of {family}")
    return found[0] if found else None


def _known(key: str, name: object, families: Mapping[str, Family]) -> Family:
    if not isinstance(name, str) or name not in families:
        supported = ", ".join(families)
        raise ValueError(f"{key}: {name!r} is not supported; it must be one of {supported}")
    return families[name]
