"""Weights in groups of 8 or 4 bits in checkpoint folders: the tensors of ``GroupFormat``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.grouped_layers import groupable
from engine.model.grouped_weights import (
    VALUE_DTYPES,
    GroupFormat,
    WeightGroups,
    dense_weights,
    group_weights,
)
from engine.model.transformer import Transformer
from engine.model.weight_bits import HEAD_DTYPE, WEIGHT_BITS
from weights.checkpoints.tensor_files import (
    STORED_DTYPES,
    StoredTensor,
    TensorSource,
    read_mapped,
)
from weights.checkpoints.tied_head import EMBEDDING
from weights.errors import CheckpointError

_WEIGHT, _MINIMUMS = ".weight", ".weight_minimums"
_HEADS = ("model.embed_tokens", "lm_head")
_BITS = {dtype: bits for bits, dtype in VALUE_DTYPES.items()}


def stored_formats(stored: Mapping[str, StoredTensor]) -> dict[str, GroupFormat]:
    """Formats of the layers whose weights are in groups, by the layer's name."""
    return _formats({name: STORED_DTYPES.get(one.dtype) for name, one in stored.items()})


def source_formats(sources: Iterable[TensorSource]) -> dict[str, GroupFormat]:
    """``stored_formats`` of tensors that are not written yet."""
    return _formats({source.name: source.dtype for source in sources})


def embedding_dtype(sources: Iterable[TensorSource]) -> str | None:
    """The name of the embedding's dtype; None if it is in groups or missing."""
    for source in sources:
        if source.name == EMBEDDING and source.dtype.is_floating_point:
            return str(source.dtype).removeprefix("torch.")
    return None


def _formats(dtypes: Mapping[str, torch.dtype | None]) -> dict[str, GroupFormat]:
    found = {}
    for name, dtype in dtypes.items():
        if name.endswith(_WEIGHT) and dtype in _BITS:
            layer, bits = name.removesuffix(_WEIGHT), _BITS[dtype]
            found[layer] = GroupFormat(bits, bits == 4 and layer + _MINIMUMS in dtypes)
    return found


def requested_formats(
    config: ModelConfig, weight_dtype: str, embedding_dtype: str = HEAD_DTYPE
) -> dict[str, GroupFormat]:
    """Formats of all layers that may be in groups: embedding and head, and all others.

    Raises:
        ConfigError: a dtype is not one of ``WEIGHT_BITS``.
    """
    dtypes = {"weight_dtype": weight_dtype, "embedding_dtype": embedding_dtype}
    for name, dtype in dtypes.items():
        if dtype not in WEIGHT_BITS:
            allowed = ", ".join(WEIGHT_BITS)
            raise ConfigError(f"{name}: {dtype!r} is not one of {allowed}")
    with torch.device("meta"):
        layers = groupable(Transformer(config))
    inner, outer = (GroupFormat(WEIGHT_BITS[dtype]) for dtype in dtypes.values())
    return {name: outer if name in _HEADS else inner for name in layers}


def group_dtype_codes(formats: Mapping[str, GroupFormat]) -> dict[str, str]:
    """Dtypes of the tensors of layers in groups, as safetensors codes by the tensor's name."""
    codes = {dtype: code for code, dtype in STORED_DTYPES.items()}
    return {
        f"{layer}.{name}": codes[tensor.dtype]
        for layer, one in formats.items()
        for name, tensor in one.tensors(0, 0).items()
    }


def load_groups(
    stored: Mapping[str, StoredTensor],
    layer: str,
    group_format: GroupFormat,
    load: Callable[[StoredTensor], Tensor],
) -> WeightGroups:
    """The weight of a layer in groups; ``load`` reads each of its tensors."""
    names = group_format.tensors(0, 0)
    values, scales_OG, *minimums = (load(stored[f"{layer}.{name}"]) for name in names)
    return WeightGroups(values, scales_OG, group_format.bits, *minimums)


def dense_sources(
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> tuple[list[TensorSource], dict[str, StoredTensor]]:
    """The dense weights of all layers in groups, and the other tensors.

    ``shapes`` has the shapes of the dense weights, by the tensor's name.
    """
    formats = stored_formats(stored)
    sources = []
    for layer, one in formats.items():
        name = layer + _WEIGHT
        load = partial(_dense, stored, layer, one, shapes[name][1], dtype)
        sources.append(TensorSource(name, shapes[name], dtype, load))
    grouped = group_dtype_codes(formats)
    return sources, {name: one for name, one in stored.items() if name not in grouped}


def rounded_sources(
    sources: Sequence[TensorSource], formats: Mapping[str, GroupFormat]
) -> list[TensorSource]:
    """The same tensors, with the weights of some layers, by name, rounded to groups."""
    made: list[TensorSource] = []
    for source in sources:
        layer = source.name.removesuffix(_WEIGHT)
        if layer in formats:
            bits = formats[layer].bits
            made += group_sources(source, formats[layer], partial(_rounded, source, bits))
        else:
            made.append(source)
    return made


def group_sources(
    dense: TensorSource, group_format: GroupFormat, load: Callable[[], WeightGroups]
) -> list[TensorSource]:
    """The tensors of a weight in groups, with the name and shape of a dense one.

    They are written one after the other, and ``load`` is called once for all.
    """
    layer = dense.name.removesuffix(_WEIGHT)
    with torch.device("meta"):
        tensors = group_format.tensors(*dense.shape)
    kept: dict[str, Tensor] = {}

    def load_one(name: str) -> Tensor:
        if not kept:
            kept.update(load().tensors)
        return kept.pop(name)

    return [
        TensorSource(f"{layer}.{name}", tuple(one.shape), one.dtype, partial(load_one, name))
        for name, one in tensors.items()
    ]


def _dense(
    stored: Mapping[str, StoredTensor],
    layer: str,
    group_format: GroupFormat,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    return dense_weights(load_groups(stored, layer, group_format, read_mapped), inputs, dtype)


def _rounded(source: TensorSource, bits: int) -> WeightGroups:
    loaded = source.load()
    assert isinstance(loaded, Tensor)
    if not loaded.isfinite().all():
        raise CheckpointError(f"tensor {source.name} has values that are NaN or infinite")
    return group_weights(loaded, bits)
