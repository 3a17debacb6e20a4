"""Reads a model of sparse-memory-lm, published or a training checkpoint, for conversion.

A published folder has the weights in ``rest.pt`` and the value table in binary files. A training
checkpoint has both in ``model.pt``.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.hot_rows import HOT_ROWS_FILE, hot_rows_content
from weights.checkpoints.importers.folded_query import BatchNorm, folded_query
from weights.checkpoints.importers.imported_model import ImportedModel
from weights.checkpoints.importers.saved_tensors import read_saved
from weights.checkpoints.importers.saved_weights import SavedWeights
from weights.checkpoints.importers.sharded_tensor import ShardedTensor
from weights.checkpoints.importers.sparse_memory_config import SparseMemoryConfig, parse_settings
from weights.checkpoints.importers.sparse_memory_files import MODEL, REST, is_published
from weights.checkpoints.importers.sparse_memory_table import (
    converted_table,
    published_hot_rows,
    published_table,
    read_meta,
)
from weights.checkpoints.importers.tokenizer_folder import read_tokenizer_folder
from weights.checkpoints.stored_groups import embedding_dtype
from weights.checkpoints.table_files import OUTPUT_DTYPES
from weights.checkpoints.tensor_files import DTYPES, StoredTensor, TensorSource, read_mapped
from weights.errors import CheckpointError

END_OF_TEXT = "<|endoftext|>"  # of GPT-2's tokenizer
_HEAD = "lm_head.weight"
# our names by theirs, after the layer; several names share the rows evenly
_LAYER = {
    "attn_norm.weight": ["input_layernorm.weight"],
    "attn.wqkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attn.wo.weight": ["self_attn.o_proj.weight"],
    "ffn_norm.weight": ["post_attention_layernorm.weight"],
}
_DENSE = {
    "ffn.w13.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "ffn.w2.weight": ["mlp.down_proj.weight"],
}
_GATE = {f"ffn.swilu_proj.{part}": [f"memory.gate.{part}"] for part in ("weight", "bias")}
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_PROJECTION = {
    f"ffn.value_proj.{part}": [f"memory.value_proj.{part}"] for part in ("weight", "bias")
}


def read_sparse_memory(
    folder: Path, tokenizer: Path, dtype: str | None, table_dtype: str | None
) -> ImportedModel:
    """Describe a folder's model.

    The 4-bit codes of a published table are kept exactly as int4_row, unless ``table_dtype`` is
    another. Batch norm and score scales become part of the queries' weights.

    Args:
        folder: one that ``is_sparse_memory``.
        tokenizer: folder of GPT-2's tokenizer, or whichever the model was trained with.
        dtype: one of ``OUTPUT_DTYPES`` for weights and floating tables; None keeps their dtypes.
        table_dtype: one of ``TABLE_DTYPES`` for the table; None applies ``dtype``.

    Raises:
        CheckpointError: a file cannot be read or does not match its checksum, or a setting or a
            tensor is missing or not supported.
        ConfigError: ``table_dtype`` is not possible.
    """
    files = read_meta(folder) if is_published(folder) else None
    path = folder / (MODEL if files is None else REST)
    if files is not None:
        files.verify(REST)
    saved = read_saved(path)
    config = _config(path, saved)
    tokens = read_tokenizer_folder(tokenizer, config.model.vocab_size, END_OF_TEXT)
    weights = SavedWeights(path, saved.get("state_dict"))
    sources = _sources(weights, config, None if dtype is None else OUTPUT_DTYPES[dtype])
    memory, extra_files = config.model.memory, dict(tokens.files)
    if memory is not None:
        (name,) = config.model.table_names
        if files is None:
            table = _repeated_table(weights, config.model)
            sources.append(converted_table(table, name, table_dtype or dtype))
        else:
            sources.append(published_table(files, name, memory, dtype, table_dtype))
            hot_rows = published_hot_rows(files, memory.num_rows)
            if hot_rows is not None:
                extra_files[HOT_ROWS_FILE] = hot_rows_content({name: hot_rows})
    elif table_dtype is not None:
        raise ConfigError(f"table_dtype: {folder} has no tables")
    weights.check_all_taken()
    checkpoint = CheckpointConfig(
        model=config.model,
        eos_ids=frozenset({tokens.eos_id}),
        bos_id=tokens.bos_id,
        dtype=embedding_dtype(sources),
    )
    return ImportedModel(checkpoint, sources, extra_files)


def _config(path: Path, saved: Any) -> SparseMemoryConfig:
    settings = saved.get("model_config") if type(saved) is dict else None
    if type(settings) is not dict:
        raise CheckpointError(f"{path}: has no dictionary named model_config")
    try:
        return parse_settings(settings)
    except ValueError as error:
        raise CheckpointError(f"{path}: model_config: {error}") from None


def _sources(
    weights: SavedWeights, config: SparseMemoryConfig, dtype: torch.dtype | None
) -> list[TensorSource]:
    """All tensors but the table."""
    embedding = weights.take("tok_emb.weight")
    if weights.has(_HEAD):
        _check_repeat(weights.take(_HEAD), embedding)
    sources = [
        _source("model.embed_tokens.weight", embedding, dtype),
        _source("model.norm.weight", weights.take("norm.weight"), dtype),
    ]
    for layer, kind in enumerate(config.model.feed_forward):
        names = dict(_LAYER)
        if kind == "dense":
            names |= _DENSE
        else:
            sources += _query_sources(weights, layer, config, dtype)
            names |= _GATE if kind == "memory_plus" else {}
            assert config.model.memory is not None
            if kind == "memory_plus" or config.model.memory.value_projection:
                names |= _PROJECTION
        for theirs, ours in names.items():
            parts = weights.take_rows(f"layers.{layer}.{theirs}", len(ours))
            for name, part in zip(ours, parts, strict=True):
                sources.append(_source(f"model.layers.{layer}.{name}", part, dtype))
    return sources


def _query_sources(
    weights: SavedWeights, layer: int, config: SparseMemoryConfig, dtype: torch.dtype | None
) -> list[TensorSource]:
    """Subkeys, and the query's weights with what is folded into them."""
    memory, prefix = config.model.memory, f"layers.{layer}.ffn."
    assert memory is not None
    width = memory.num_heads * memory.query_dim
    query = (
        weights.take(f"{prefix}query_proj.weight", (width, config.model.hidden_size)),
        weights.take(f"{prefix}query_proj.bias", (width,)),
    )
    norm = scale = None
    if config.has_query_norm:
        norm = [weights.take(f"{prefix}query_norm.{part}", (width,)) for part in _BATCH_NORM]
        weights.discard(f"{prefix}query_norm.num_batches_tracked")
    if config.has_score_scale:
        scale = weights.take(f"{prefix}log_score_scale", (memory.num_heads,))
    ours = f"model.layers.{layer}.memory."
    sources = [_source(f"{ours}subkeys", weights.take(f"{prefix}keys"), dtype)]
    for part, one in enumerate(query):
        load = partial(_folded, query, norm, scale, part, _dtype(one, dtype))
        name = f"{ours}query.{('weight', 'bias')[part]}"
        sources.append(TensorSource(name, one.shape, _dtype(one, dtype), load))
    return sources


def _folded(
    query: tuple[StoredTensor, StoredTensor],
    norm: list[StoredTensor] | None,
    scale: StoredTensor | None,
    part: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight (part 0) or the bias (1)."""
    weight_FD, bias_F = map(read_mapped, query)
    batch_norm = None if norm is None else BatchNorm(*map(read_mapped, norm))
    log_scale_H = None if scale is None else read_mapped(scale)
    found = folded_query(weight_FD, bias_F, batch_norm, log_scale_H)[part].to(dtype)
    if not found.isfinite().all():
        folded = query[part]
        raise CheckpointError(
            f"{folded.file}: tensor {folded.name}: is not finite with its norm and scale in {dtype}"
        )
    return found


def _repeated_table(weights: SavedWeights, model: ModelConfig) -> StoredTensor:
    """The table, which every memory layer stores."""
    first, *others = [
        weights.take(f"layers.{layer}.ffn.values.weight") for layer in model.memory_layers
    ]
    for other in others:
        _check_repeat(other, first)
    return first


def _check_repeat(tensor: StoredTensor, first: StoredTensor) -> None:
    one, other = (ShardedTensor(each.shape, (each,)) for each in (tensor, first))
    if not one.equals(other):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: differs from {first.name}, which it repeats"
        )


def _source(name: str, tensor: StoredTensor, dtype: torch.dtype | None) -> TensorSource:
    return TensorSource(name, tensor.shape, _dtype(tensor, dtype), partial(read_mapped, tensor))


def _dtype(tensor: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    return DTYPES[tensor.dtype] if dtype is None else dtype
