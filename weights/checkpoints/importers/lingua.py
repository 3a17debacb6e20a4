"""Reads a training run of facebookresearch/memory ("Memory Layers at Scale") for conversion.

Its weights are in ``consolidated/consolidated.pth``, or in folders of torch.distributed.checkpoint,
one a step, each with its ``params.json``. The optimiser's state is not read.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.importers.distributed_checkpoint import read_shards
from weights.checkpoints.importers.imported_model import ImportedModel
from weights.checkpoints.importers.lingua_config import read_params
from weights.checkpoints.importers.lingua_files import METADATA, PARAMS, WEIGHTS, weights_folder
from weights.checkpoints.importers.lingua_names import LAYER, TIED_HEAD, TOP
from weights.checkpoints.importers.rotary_lanes import pair_halves
from weights.checkpoints.importers.saved_tensors import read_saved
from weights.checkpoints.importers.saved_weights import named_tensor
from weights.checkpoints.importers.sharded_tensor import ShardedTensor
from weights.checkpoints.importers.tokenizer_folder import read_tokenizer_folder
from weights.checkpoints.stored_groups import embedding_dtype
from weights.checkpoints.tensor_files import TensorSource
from weights.errors import CheckpointError

# modules that a PEER layer stores and does not use
_UNUSED_BY_PEER = re.compile(r"feed_forward\.(value_proj|swilu_projection)\.(weight|bias)")
_LAYER_NAME = re.compile(r"layers\.(\d{1,5})\.(.+)")


def read_lingua(
    folder: Path, tokenizer: Path, dtype: torch.dtype | None, table_dtype: torch.dtype | None
) -> ImportedModel:
    """Describe a run's model; tensors keep their dtypes, or get ``dtype`` or ``table_dtype``.

    Rotary lanes are reordered to pair halves. Layers that share a table may all store it.

    Args:
        folder: the run's folder, or one of those in it; see ``weights_folder``.
        tokenizer: folder of the tokenizer that the run was trained with.

    Raises:
        CheckpointError: a file cannot be read, or a key of the settings or a tensor is not
            supported.
    """
    place = weights_folder(folder)
    if place is None:
        raise CheckpointError(f"{folder}: has neither {WEIGHTS} nor {METADATA}")
    model = read_params(place / PARAMS)
    tokens = read_tokenizer_folder(tokenizer, model.vocab_size)
    path = place / WEIGHTS
    if path.exists():
        tensors = _named(path, _model_tensors(path), model)
    else:
        tensors = _named(place, read_shards(place, "model."), model)
    tables = set(model.table_names)
    sources = [
        _source(name, tensor, table_dtype if name in tables else dtype, model)
        for name, tensor in tensors.items()
    ]
    config = CheckpointConfig(
        model=model,
        eos_ids=frozenset({tokens.eos_id}),
        bos_id=tokens.bos_id,
        dtype=embedding_dtype(sources),
    )
    return ImportedModel(config, sources, tokens.files)


def _model_tensors(path: Path) -> dict[str, ShardedTensor]:
    saved = read_saved(path)
    model = saved.get("model") if type(saved) is dict else None
    if type(model) is not dict:
        raise CheckpointError(f"{path}: has no dictionary named model")
    tensors = {}
    for name, found in model.items():
        tensor = named_tensor(path, name, found)
        tensors[tensor.name] = ShardedTensor(tensor.shape, (tensor,))
    return tensors


def _named(
    path: Path, stored: Mapping[str, ShardedTensor], model: ModelConfig
) -> dict[str, ShardedTensor]:
    """The tensors that the model needs, by our names."""
    layers = [f"layers.{layer}.attention_norm.weight" for layer in range(model.num_layers)]
    # a wrong layer count would build a huge meta model
    if missing := [name for name in layers if name not in stored][:1]:
        raise CheckpointError(f"{path}: tensor {missing[0]} is missing")
    tensors: dict[str, ShardedTensor] = {}
    for theirs, tensor in stored.items():
        name = _our_name(path, theirs, model)
        if name is None:
            continue
        if name in tensors and not tensors[name].equals(tensor):
            raise CheckpointError(f"{path}: tensor {theirs!r}: differs from what it repeats")
        tensors.setdefault(name, tensor)
    return tensors


def _our_name(path: Path, name: str, model: ModelConfig) -> str | None:
    """None for a tensor that the model does not use."""
    if model.tie_embeddings and name in (TIED_HEAD, "output.weight"):
        name = "tok_embeddings.weight"  # a repeat of it
    if name in TOP:
        return TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or int(match[1]) >= model.num_layers:
        raise CheckpointError(f"{path}: tensor {name!r:.100}: is not part of this model")
    layer, part = int(match[1]), match[2]
    if model.feed_forward[layer] == "peer" and _UNUSED_BY_PEER.fullmatch(part):
        return None
    if part not in LAYER:
        raise CheckpointError(f"{path}: tensor {name!r:.100}: is not part of this model")
    ours = LAYER[part]
    is_table = ours in ("memory.table", "memory.down_table")
    if is_table and model.memory is not None and model.memory.share_values:
        return ours
    return f"model.layers.{layer}.{ours}"


def _source(
    name: str, tensor: ShardedTensor, dtype: torch.dtype | None, model: ModelConfig
) -> TensorSource:
    shape = tensor.shape
    load: Callable[[], Tensor | Iterator[Tensor]] = tensor.parts
    if name.endswith("memory.subkeys") and model.memory is not None:
        # a tensor of another size is refused by its shape
        wanted = (model.memory.num_heads, 2, model.memory.num_subkeys, model.memory.query_dim // 2)
        if shape == (math.prod(wanted[:3]), wanted[3]):
            shape, load = wanted, lambda: tensor.whole().view(wanted)
    for part, num_heads in (("q_proj", model.num_heads), ("k_proj", model.num_kv_heads)):
        if f".{part}." in name and shape[:1] == (num_heads * model.head_dim,):
            load = partial(_reordered, tensor, num_heads)
    return TensorSource(name, shape, tensor.dtype if dtype is None else dtype, load)


def _reordered(tensor: ShardedTensor, num_heads: int) -> Tensor:
    return pair_halves(tensor.whole(), num_heads)
