"""Reads a llama.cpp model (GGUF, architecture llama) for conversion to a checkpoint folder."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.rope_scaling import Llama3Scaling
from engine.model.rotary import rope_frequencies
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.importers.gguf_files import gguf_files
from weights.checkpoints.importers.gguf_metadata import (
    open_gguf,
    optional,
    required,
    required_list,
    value,
)
from weights.checkpoints.importers.gguf_tokenizer import GgufTokenizer, tokenizer_files
from weights.checkpoints.importers.gguf_weights import dense_source, weight_sources
from weights.checkpoints.importers.imported_model import ImportedModel
from weights.checkpoints.importers.rotary_lanes import pair_halves
from weights.checkpoints.stored_groups import embedding_dtype, source_formats
from weights.checkpoints.tensor_files import TensorSource
from weights.errors import CheckpointError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
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
_ROPE_FACTORS = "rope_freqs.weight"
# the scalings of Llama 3.1 and 3.2; a GGUF file has only the resulting divisors
_LLAMA3_SCALINGS = (Llama3Scaling(8.0, 1.0, 4.0, 8192), Llama3Scaling(32.0, 1.0, 4.0, 8192))


def read_gguf(path: Path, dtype: torch.dtype | None) -> ImportedModel:
    """Describe a GGUF file, or the split model of which it is the first part.

    With a ``dtype``, all tensors are dequantised to it when they are written. Without one,
    quantised weights are stored in groups (``weight_sources``), and others in their own dtype.

    Raises:
        CheckpointError: the file is not GGUF, or its architecture, a tensor, a quantisation or its
            tokenizer is not supported.
    """
    readers = [open_gguf(file) for file in gguf_files(path)]
    reader = readers[0]
    try:
        _check_keys(reader)
        _check_split(readers)
        tensors = _tensors(readers)
        config = _read_config(reader, tensors)
        sources = [
            source
            for name, tensor in tensors.items()
            if name != _ROPE_FACTORS
            for source in _sources(tensor, config.model, dtype)
        ]
        computes_in = embedding_dtype(sources) or "bfloat16"
        config = replace(config, dtype=computes_in, has_groups=bool(source_formats(sources)))
        return ImportedModel(config, sources, tokenizer_files(_read_tokenizer(reader)))
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_split(readers: Sequence[gguf.GGUFReader]) -> None:
    """Raise CheckpointError unless the parts of a split model are those that its files name."""
    for number, reader in enumerate(readers):
        stored = optional(reader, "split.no", int), optional(reader, "split.count", int)
        found = stored[0] or 0, 1 if stored[1] is None else stored[1]
        if found != (number, len(readers)):
            raise CheckpointError(
                f"split.no, split.count: part {number + 1} of {len(readers)} files is stored as"
                f" {found[0] + 1} of {found[1]}"
            )
    total = optional(readers[0], "split.tensors.count", int)
    count = sum(len(reader.tensors) for reader in readers)
    if total is not None and total != count:
        raise CheckpointError(f"split.tensors.count: {total}, but the files have {count} tensors")


def _tensors(readers: Sequence[gguf.GGUFReader]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for number, reader in enumerate(readers):
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {tensor.name}: is in part {number + 1} and in an earlier one"
                )
            tensors[tensor.name] = tensor
    return tensors


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


def _token_id(reader: gguf.GGUFReader, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = optional(reader, key, int)
    num_tokens = len(required_list(reader, "tokenizer.ggml.tokens", str))
    if token_id is not None and not 0 <= token_id < num_tokens:
        raise CheckpointError(f"{key}: {token_id} is outside the vocabulary")
    return token_id


def _read_config(reader: gguf.GGUFReader, tensors: dict[str, Any]) -> CheckpointConfig:
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
        rope_scaling=_rope_scaling(tensors.get(_ROPE_FACTORS), head_dim, theta),
        tie_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
    )
    eos = [_token_id(reader, name) for name in ("eos", "eot", "eom")]
    return CheckpointConfig(
        model=model,
        eos_ids=frozenset(token_id for token_id in eos if token_id is not None),
        bos_id=_token_id(reader, "bos"),
    )


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
    raise CheckpointError(f"tensor {_ROPE_FACTORS}: is not a scaling of Llama 3.1 or 3.2")


def _sources(tensor: Any, model: ModelConfig, dtype: torch.dtype | None) -> list[TensorSource]:
    name = _hugging_face_name(tensor.name)

    def reorder(rows: Tensor) -> Tensor:
        if ".q_proj." in name:
            return pair_halves(rows, model.num_heads)
        if ".k_proj." in name:
            return pair_halves(rows, model.num_kv_heads)
        return rows

    if dtype is None and len(tensor.shape) == 2:
        return weight_sources(name, tensor, reorder)
    return [dense_source(name, tensor, dtype, reorder)]


def _hugging_face_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise CheckpointError(f"tensor {name}: is not part of a llama model")
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def _read_tokenizer(reader: gguf.GGUFReader) -> GgufTokenizer:
    tokens = required_list(reader, "tokenizer.ggml.tokens", str)
    model = required(reader, "tokenizer.ggml.model", str)
    pre = optional(reader, "tokenizer.ggml.pre", str) or "default"

    def flag(name: str, default: bool) -> bool:
        found = optional(reader, f"tokenizer.ggml.{name}", bool)
        return default if found is None else found

    # without scores or merges, text would silently get the ids of single letters
    is_llama, is_gpt2 = model == "llama", model == "gpt2"
    return GgufTokenizer(
        model=model,
        pre=pre,
        tokens=tokens,
        token_types=required_list(reader, "tokenizer.ggml.token_type", int),
        scores=required_list(reader, "tokenizer.ggml.scores", float) if is_llama else (),
        merges=required_list(reader, "tokenizer.ggml.merges", str) if is_gpt2 else (),
        bos_id=_token_id(reader, "bos"),
        eos_id=_token_id(reader, "eos"),
        unknown_id=_token_id(reader, "unknown"),
        # llama.cpp's defaults, which depend on the tokenizer model
        add_bos=flag("add_bos_token", is_llama or pre == "llama-bpe"),
        add_eos=flag("add_eos_token", False),
        add_space_prefix=flag("add_space_prefix", is_llama),
        chat_template=optional(reader, "tokenizer.chat_template", str),
    )
