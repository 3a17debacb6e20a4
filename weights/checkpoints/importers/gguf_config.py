"""The settings of a GGUF model: its shapes, and the ids of special tokens."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import torch

from engine.model.config import ModelConfig
from engine.model.rope_scaling import Llama3Scaling
from engine.model.rotary import rope_frequencies
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.importers.gguf_metadata import optional, required, required_list, value
from weights.errors import CheckpointError

# keys that are read, and keys that are accepted only with a neutral value
_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.type": "none",
}
ROPE_FACTORS = "rope_freqs.weight"
# the scalings of Llama 3.1 and 3.2; a GGUF file has only the resulting divisors
_LLAMA3_SCALINGS = (Llama3Scaling(8.0, 1.0, 4.0, 8192), Llama3Scaling(32.0, 1.0, 4.0, 8192))


def read_config(reader: gguf.GGUFReader, tensors: Mapping[str, Any]) -> CheckpointConfig:
    """The settings of a model with these tensors.

    Raises:
        CheckpointError: a key is missing or not supported.
    """
    _check_keys(reader)
    architecture = required(reader, "general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"general.architecture: {architecture!r} is not supported; must be 'llama'"
        )
    hidden_size = _size(reader, "embedding_length")
    num_heads = _size(reader, "attention.head_count")
    head_dim = _size(reader, "attention.key_length", hidden_size // num_heads)
    theta = _decimal(optional(reader, "llama.rope.freq_base", float) or 10_000.0)
    for name in ("rope.dimension_count", "attention.value_length"):
        if _size(reader, name, head_dim) != head_dim:
            raise CheckpointError(f"llama.{name}: must be the head dimension {head_dim}")
    num_layers = _size(reader, "block_count")
    for layer in range(num_layers):  # a wrong layer count would build a huge meta model
        if (norm := f"blk.{layer}.attn_norm.weight") not in tensors:
            raise CheckpointError(
                f"llama.block_count: is {num_layers}, but tensor {norm} is missing"
            )
    model = ModelConfig(
        vocab_size=len(required_list(reader, "tokenizer.ggml.tokens", str)),
        hidden_size=hidden_size,
        intermediate_size=_size(reader, "feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_size(reader, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_positions=_size(reader, "context_length"),
        rms_norm_eps=_decimal(required(reader, "llama.attention.layer_norm_rms_epsilon", float)),
        rope_theta=theta,
        rope_scaling=_rope_scaling(tensors.get(ROPE_FACTORS), head_dim, theta),
        tie_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
    )
    eos = [token_id(reader, name) for name in ("eos", "eot", "eom")]
    return CheckpointConfig(
        model=model,
        eos_ids=frozenset(one for one in eos if one is not None),
        bos_id=token_id(reader, "bos"),
    )


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


def _check_keys(reader: gguf.GGUFReader) -> None:
    for key in reader.fields:
        name = key.removeprefix("llama.")
        if name != key and name not in _KEYS:
            found = value(reader, key)
            if found != _NEUTRAL.get(name, ()):
                raise CheckpointError(f"{key}: {found!r:.100} is not supported")


def _size(reader: gguf.GGUFReader, name: str, default: int | None = None) -> int:
    """A width or count from the metadata."""
    key = f"llama.{name}"
    found = default if value(reader, key) is None else optional(reader, key, int)
    if found is None or not 0 < found <= 2**24:
        raise CheckpointError(f"{key}: must be an integer from 1 to 2**24, not {found!r}")
    return found


def _decimal(stored: float) -> float:
    """The decimal number that an fp32 value stands for: 1e-05, not 9.999999747378752e-06."""
    return float(f"{stored:.7g}")


def _rope_scaling(factors: Any, head_dim: int, theta: float) -> Llama3Scaling | None:
    if factors is None:
        return None
    found = torch.from_numpy(np.array(factors.data, dtype=np.float32).reshape(-1))
    unscaled = rope_frequencies(head_dim, theta, None)
    for scaling in _LLAMA3_SCALINGS:
        divisors = unscaled / rope_frequencies(head_dim, theta, scaling)
        if divisors.shape == found.shape and torch.allclose(divisors, found, rtol=1e-3):
            return scaling
    raise CheckpointError(f"tensor {ROPE_FACTORS}: is not a scaling of Llama 3.1 or 3.2")
