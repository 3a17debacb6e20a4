"""Reads a llama.cpp model (GGUF, architecture llama) for conversion to a checkpoint folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from engine.model.config import ModelConfig, RopeScaling
from engine.model.rotary import rope_frequencies
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.importers.gguf_files import gguf_files
from weights.checkpoints.importers.gguf_tokenizer import GgufTokenizer, tokenizer_files
from weights.checkpoints.importers.gguf_weights import dense_source, weight_sources
from weights.checkpoints.stored_groups import source_formats
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
_LLAMA3_SCALINGS = (RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192))


@dataclass(frozen=True)
class ImportedModel:
    """A model ready to be saved by ``weights.checkpoints.checkpoint.save_checkpoint``."""

    config: CheckpointConfig
    sources: list[TensorSource]
    extra_files: dict[str, bytes]


def read_gguf(path: Path, dtype: torch.dtype | None) -> ImportedModel:
    """Describe a GGUF file, or the split model of which it is the first part.

    With a ``dtype``, all tensors are dequantised to it when they are written. Without one,
    quantised weights are stored in groups (``weight_sources``), and others in bfloat16.

    Raises:
        CheckpointError: the file is not GGUF, or its architecture, a tensor, a quantisation or its
            tokenizer is not supported.
    """
    readers = [_opened(file) for file in gguf_files(path)]
    reader = readers[0]
    try:
        _check_keys(reader)
        _check_split(readers)
        tensors = {tensor.name: tensor for one in readers for tensor in one.tensors}
        config = _read_config(reader, tensors)
        wanted, keeps_groups = dtype or torch.bfloat16, dtype is None
        sources = [
            source
            for name, tensor in tensors.items()
            if name != _ROPE_FACTORS
            for source in _sources(tensor, config.model, wanted, keeps_groups=keeps_groups)
        ]
        config = replace(config, has_groups=bool(source_formats(sources)))
        return ImportedModel(config, sources, tokenizer_files(_read_tokenizer(reader)))
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _opened(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{file}: is truncated or not a GGUF file ({error})") from None


def _check_split(readers: Sequence[gguf.GGUFReader]) -> None:
    """Raise CheckpointError unless the parts of a split model are those that its files name."""
    for number, reader in enumerate(readers):
        found = tuple(
            _value(reader, f"split.{name}", one) for name, one in (("no", 0), ("count", 1))
        )
        if found != (number, len(readers)):
            raise CheckpointError(
                f"split.no, split.count: part {number + 1} of {len(readers)} files is stored as"
                f" {found[0] + 1} of {found[1]}"
            )
    total = _value(readers[0], "split.tensors.count")
    count = sum(len(reader.tensors) for reader in readers)
    if total is not None and total != count:
        raise CheckpointError(f"split.tensors.count: {total}, but the files have {count} tensors")


def _value(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _check_keys(reader: gguf.GGUFReader) -> None:
    for key in reader.fields:
        name = key.removeprefix("llama.")
        if name != key and name not in _KEYS and _value(reader, key) != _NEUTRAL.get(name, ()):
            raise CheckpointError(f"{key}: {_value(reader, key)!r} is not supported")


def _size(reader: gguf.GGUFReader, name: str, default: int | None = None) -> int:
    """A width or count from the metadata."""
    value = _value(reader, f"llama.{name}", default)
    if not isinstance(value, int) or not 0 < value <= 2**24:
        raise CheckpointError(f"llama.{name}: must be an integer from 1 to 2**24, not {value!r}")
    return value


def _token_id(reader: gguf.GGUFReader, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = _value(reader, key)
    if token_id is not None and not token_id < len(_required(reader, "tokenizer.ggml.tokens")):
        raise CheckpointError(f"{key}: {token_id} is outside the vocabulary")
    return None if token_id is None else int(token_id)


def _required(reader: gguf.GGUFReader, key: str) -> Any:
    value = _value(reader, key)
    if value is None:
        raise CheckpointError(f"{key}: missing")
    return value


def _read_config(reader: gguf.GGUFReader, tensors: dict[str, Any]) -> CheckpointConfig:
    architecture = _required(reader, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"general.architecture: {architecture!r} is not supported; must be 'llama'"
        )
    hidden_size = _size(reader, "embedding_length")
    num_heads = _size(reader, "attention.head_count")
    head_dim = _size(reader, "attention.key_length", hidden_size // num_heads)
    theta = _decimal(_value(reader, "llama.rope.freq_base", 10_000.0))
    for name in ("rope.dimension_count", "attention.value_length"):
        if _size(reader, name, head_dim) != head_dim:
            raise CheckpointError(f"llama.{name}: must be the head dimension {head_dim}")
    model = ModelConfig(
        vocab_size=len(_required(reader, "tokenizer.ggml.tokens")),
        hidden_size=hidden_size,
        intermediate_size=_size(reader, "feed_forward_length"),
        num_layers=_size(reader, "block_count"),
        num_heads=num_heads,
        num_kv_heads=_size(reader, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_positions=_size(reader, "context_length"),
        rms_norm_eps=_decimal(_required(reader, "llama.attention.layer_norm_rms_epsilon")),
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


def _rope_scaling(factors: Any, head_dim: int, theta: float) -> RopeScaling | None:
    if factors is None:
        return None
    found = torch.from_numpy(np.array(factors.data, dtype=np.float32).reshape(-1))
    unscaled = rope_frequencies(head_dim, theta, None)
    for scaling in _LLAMA3_SCALINGS:
        divisors = unscaled / rope_frequencies(head_dim, theta, scaling)
        if divisors.shape == found.shape and torch.allclose(divisors, found, rtol=1e-3):
            return scaling
    raise CheckpointError(f"tensor {_ROPE_FACTORS}: is not a scaling of Llama 3.1 or 3.2")


def _sources(
    tensor: Any, model: ModelConfig, dtype: torch.dtype, *, keeps_groups: bool
) -> list[TensorSource]:
    name = _hugging_face_name(tensor.name)

    def reorder(rows: Tensor) -> Tensor:
        if ".q_proj." in name:
            return _pair_halves(rows, model.num_heads)
        if ".k_proj." in name:
            return _pair_halves(rows, model.num_kv_heads)
        return rows

    if keeps_groups and len(tensor.shape) == 2:
        return weight_sources(name, tensor, dtype, reorder)
    return [dense_source(name, tensor, dtype, reorder)]


def _hugging_face_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise CheckpointError(f"tensor {name}: is not part of a llama model")
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def _pair_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder rotary lanes: llama.cpp pairs neighbours, this model pairs halves."""
    rest = weight.shape[1:]
    return weight.view(num_heads, -1, 2, *rest).transpose(1, 2).reshape(weight.shape)


def _read_tokenizer(reader: gguf.GGUFReader) -> GgufTokenizer:
    tokens: Sequence[str] = _required(reader, "tokenizer.ggml.tokens")
    model = _required(reader, "tokenizer.ggml.model")
    pre = _value(reader, "tokenizer.ggml.pre", "default")
    default_bos = model == "llama" or pre == "llama-bpe"
    return GgufTokenizer(
        model=model,
        pre=pre,
        tokens=tokens,
        token_types=_required(reader, "tokenizer.ggml.token_type"),
        # without them, text would silently get the ids of single letters
        scores=_required(reader, "tokenizer.ggml.scores") if model == "llama" else (),
        merges=_required(reader, "tokenizer.ggml.merges") if model == "gpt2" else (),
        bos_id=_token_id(reader, "bos"),
        eos_id=_token_id(reader, "eos"),
        unknown_id=_token_id(reader, "unknown"),
        # llama.cpp's defaults, which depend on the tokenizer model
        add_bos=bool(_value(reader, "tokenizer.ggml.add_bos_token", default_bos)),
        add_eos=bool(_value(reader, "tokenizer.ggml.add_eos_token", False)),
        add_space_prefix=bool(_value(reader, "tokenizer.ggml.add_space_prefix", model == "llama")),
        chat_template=_value(reader, "tokenizer.chat_template"),
    )
