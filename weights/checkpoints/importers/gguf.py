"""Reads a llama.cpp model (GGUF) for conversion to a checkpoint folder."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from engine.model.config import ModelConfig
from weights.checkpoints.importers.gguf_config import (
    ROPE_FACTORS,
    has_neighbour_lanes,
    read_config,
    token_id,
)
from weights.checkpoints.importers.gguf_files import gguf_files
from weights.checkpoints.importers.gguf_metadata import (
    open_gguf,
    optional,
    required,
    required_list,
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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


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
        _check_split(readers)
        tensors = _tensors(readers)
        config = read_config(reader, tensors)
        sources = [
            source
            for name, tensor in tensors.items()
            if name != ROPE_FACTORS
            for source in _sources(tensor, config.model, dtype, has_neighbour_lanes(reader))
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


def _sources(
    tensor: Any, model: ModelConfig, dtype: torch.dtype | None, has_neighbour_lanes: bool
) -> list[TensorSource]:
    name = _hugging_face_name(tensor.name)

    def reorder(rows: Tensor) -> Tensor:
        if has_neighbour_lanes and ".q_proj." in name:
            return pair_halves(rows, model.num_heads)
        if has_neighbour_lanes and ".k_proj." in name:
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
        raise CheckpointError(f"tensor {name}: is not part of such a model")
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
        bos_id=token_id(reader, "bos"),
        eos_id=token_id(reader, "eos"),
        unknown_id=token_id(reader, "unknown"),
        # llama.cpp's defaults, which depend on the tokenizer model
        add_bos=flag("add_bos_token", is_llama or pre == "llama-bpe"),
        add_eos=flag("add_eos_token", False),
        add_space_prefix=flag("add_space_prefix", is_llama),
        chat_template=optional(reader, "tokenizer.chat_template", str),
    )
