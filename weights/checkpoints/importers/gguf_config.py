"""The settings of a GGUF model: its shapes, and the ids of special tokens."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import torch

from engine.model.config import ModelConfig
from engine.model.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from engine.model.rotary import rope_frequencies
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.importers.gguf_metadata import optional, required, required_list, value
from weights.errors import CheckpointError

# architectures -> whether pairs of rotary lanes are neighbours in q and k; and their fields
_NEIGHBOURS = {"llama": True, "qwen2": False, "qwen3": False}
# keys that are read, and keys that are accepted only with a neutral value
_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "rope.scale_linear": 1.0,
}
ROPE_FACTORS = "rope_freqs.weight"
# the scalings of Llama 3.1 and 3.2; a GGUF file has only the resulting divisors
_LLAMA3_SCALINGS = (Llama3Scaling(8.0, 1.0, 4.0, 8192), Llama3Scaling(32.0, 1.0, 4.0, 8192))


def read_config(reader: gguf.GGUFReader, tensors: Mapping[str, Any]) -> CheckpointConfig:
    """The settings of a model with these tensors.

    Raises:
        CheckpointError: a key is missing or not supported.
    """
    prefix = f"{_architecture(reader)}."
    _check_keys(reader, prefix)
    hidden_size = _size(reader, "embedding_length")
    num_heads = _size(reader, "attention.head_count")
    head_dim = _size(reader, "attention.key_length", hidden_size // num_heads)
    theta = _decimal(optional(reader, f"{prefix}rope.freq_base", float) or 10_000.0)
    for name in ("rope.dimension_count", "attention.value_length"):
        if _size(reader, name, head_dim) != head_dim:
            raise CheckpointError(f"{prefix}{name}: must be the head dimension {head_dim}")
    num_layers = _size(reader, "block_count")
    for layer in range(num_layers):  # a wrong layer count would build a huge meta model
        if (norm := f"blk.{layer}.attn_norm.weight") not in tensors:
            raise CheckpointError(
                f"{prefix}block_count: is {num_layers}, but tensor {norm} is missing"
            )
    positions = _size(reader, "context_length")
    biases = "blk.0.attn_q.bias" in tensors, "blk.0.attn_output.bias" in tensors
    model = ModelConfig(
        vocab_size=len(required_list(reader, "tokenizer.ggml.tokens", str)),
        hidden_size=hidden_size,
        intermediate_size=_size(reader, "feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_size(reader, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        # a sliding window changes nothing within it
        max_positions=min(positions, _size(reader, "attention.sliding_window", positions)),
        rms_norm_eps=_decimal(required(reader, f"{prefix}attention.layer_norm_rms_epsilon", float)),
        rope_theta=theta,
        rope_scaling=_rope_scaling(reader, tensors, head_dim, theta),
        tie_embeddings="output.weight" not in tensors,
        attention_bias=all(biases),
        qkv_bias=biases == (True, False),
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )
    eos = [token_id(reader, name) for name in ("eos", "eot", "eom")]
    return CheckpointConfig(
        model=model,
        eos_ids=frozenset(one for one in eos if one is not None),
        bos_id=token_id(reader, "bos"),
    )


def has_neighbour_lanes(reader: gguf.GGUFReader) -> bool:
    """Whether pairs of rotary lanes are neighbours; else they are e and e + head_dim / 2."""
    return _NEIGHBOURS[_architecture(reader)]


def _architecture(reader: gguf.GGUFReader) -> str:
    found = required(reader, "general.architecture", str)
    if found not in _NEIGHBOURS:
        supported = ", ".join(_NEIGHBOURS)
        raise CheckpointError(
            f"general.architecture: {found!r} is not supported; it must be one of {supported}"
        )
    return found


def token_id(reader: gguf.GGUFReader, name: str) -> int | None:
    """The id of a special token: ``bos``, ``eos``, ``eot``, ``eom`` or ``unknown``.

    Raises:
        CheckpointError: it is outside the vocabulary.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    found = optional(reader, key, int)
    num_tokens = len(required_list(reader, "tokenizer.ggml.tokens", str))
    if found is not None and not 0 <= found < num_tokens:
        raise CheckpointError(f"{key}: {found} is outside the vocabulary")
    return found


def _check_keys(reader: gguf.GGUFReader, prefix: str) -> None:
    for key in reader.fields:
        name = key.removeprefix(prefix)
        if name != key and name not in _KEYS:
            found = value(reader, key)
            if found != _NEUTRAL.get(name, ()):
                raise CheckpointError(f"{key}: {found!r:.100} is not supported")


def _size(reader: gguf.GGUFReader, name: str, default: int | None = None) -> int:
    """A width or count from the metadata."""
    key = f"{_architecture(reader)}.{name}"
    found = default if value(reader, key) is None else optional(reader, key, int)
    if found is None or not 0 < found <= 2**24:
        raise CheckpointError(f"{key}: must be an integer from 1 to 2**24, not {found!r}")
    return found


def _decimal(stored: float) -> float:
    """The decimal number that an fp32 value stands for: 1e-05, not 9.999999747378752e-06."""
    return float(f"{stored:.7g}")


def _rope_scaling(
    reader: gguf.GGUFReader, tensors: Mapping[str, Any], head_dim: int, theta: float
) -> RopeScaling | None:
    prefix = f"{_architecture(reader)}.rope.scaling."
    kind = optional(reader, f"{prefix}type", str) or "none"
    if ROPE_FACTORS in tensors:
        if kind != "none":
            raise CheckpointError(f"{prefix}type: {kind!r} beside tensor {ROPE_FACTORS}")
        return _llama3_scaling(tensors[ROPE_FACTORS], head_dim, theta)
    if kind == "none":
        return None
    factor = _decimal(required(reader, f"{prefix}factor", float))
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "yarn":
        return YarnScaling(factor, _size(reader, "rope.scaling.original_context_length"))
    raise CheckpointError(f"{prefix}type: {kind!r} is not supported")


def _llama3_scaling(factors: Any, head_dim: int, theta: float) -> Llama3Scaling:
    found = torch.from_numpy(np.array(factors.data, dtype=np.float32).reshape(-1))
    unscaled = rope_frequencies(head_dim, theta, None)
    for scaling in _LLAMA3_SCALINGS:
        divisors = unscaled / rope_frequencies(head_dim, theta, scaling)
        if divisors.shape == found.shape and torch.allclose(divisors, found, rtol=1e-3):
            return scaling
    raise CheckpointError(f"tensor {ROPE_FACTORS}: is not a scaling of Llama 3.1 or 3.2")
