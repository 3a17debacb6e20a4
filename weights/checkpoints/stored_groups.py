"""Weights in groups of 8 or 4 bits in checkpoint folders: ``weight`` and ``weight_scales``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.grouped_weights import (
    VALUE_DTYPES,
    WeightGroups,
    dense_weights,
    group_shapes,
    group_weights,
    groupable,
)
from engine.model.transformer import Transformer
from engine.model.weight_bits import HEAD_DTYPE, WEIGHT_BITS
from weights.checkpoints.tensor_files import (
    STORED_DTYPES,
    StoredTensor,
    TensorSource,
    read_mapped,
)
from weights.errors import CheckpointError

_WEIGHT, _SCALES = ".weight", ".weight_scales"
_HEADS = ("model.embed_tokens", "lm_head")
_BITS = {dtype: bits for bits, dtype in VALUE_DTYPES.items()}


def stored_bits(stored: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Bits of the layers whose weights are in groups, by the layer's name."""
    return _bits({name: STORED_DTYPES.get(one.dtype) for name, one in stored.items()})


def source_bits(sources: Iterable[TensorSource]) -> dict[str, int]:
    """Bits of the layers in groups among tensors that are not written yet, by the layer's name."""
    return _bits({source.name: source.dtype for source in sources})


def embedding_dtype(sources: Iterable[TensorSource]) -> str | None:
    """The name of the embedding's dtype; None if it is in groups or missing."""
    for source in sources:
        if source.name == "model.embed_tokens.weight" and source.dtype.is_floating_point:
            return str(source.dtype).removeprefix("torch.")
    return None


def _bits(dtypes: Mapping[str, torch.dtype | None]) -> dict[str, int]:
    return {
        name.removesuffix(_WEIGHT): _BITS[dtype]
        for name, dtype in dtypes.items()
        if name.endswith(_WEIGHT) and dtype in _BITS
    }


def requested_bits(
    config: ModelConfig, weight_dtype: str, embedding_dtype: str = HEAD_DTYPE
) -> dict[str, int]:
    """Bits of all layers that may be in groups: embedding and head, and all others.

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
    bits, head_bits = WEIGHT_BITS[weight_dtype], WEIGHT_BITS[embedding_dtype]
    return {name: head_bits if name in _HEADS else bits for name in layers}


def group_dtype_codes(bits: Mapping[str, int]) -> dict[str, str]:
    """Dtypes of the tensors of layers in groups, as safetensors codes by the tensor's name."""
    codes = {dtype: code for code, dtype in STORED_DTYPES.items()}
    found = {}
    for name, count in bits.items():
        found[name + _WEIGHT] = codes[VALUE_DTYPES[count]]
        found[name + _SCALES] = codes[torch.float16]
    return found


def load_groups(
    stored: Mapping[str, StoredTensor],
    layer: str,
    bits: int,
    load: Callable[[StoredTensor], Tensor],
) -> WeightGroups:
    """The weight of a layer in groups; ``load`` reads each of its tensors."""
    return WeightGroups(load(stored[layer + _WEIGHT]), load(stored[layer + _SCALES]), bits)


def dense_sources(
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> tuple[list[TensorSource], dict[str, StoredTensor]]:
    """The dense weights of all layers in groups, and the other tensors.

    ``shapes`` has the shapes of the dense weights, by the tensor's name.
    """
    bits = stored_bits(stored)
    sources = []
    for layer, count in bits.items():
        name = layer + _WEIGHT
        load = partial(_dense, stored, layer, count, shapes[name][1], dtype)
        sources.append(TensorSource(name, shapes[name], dtype, load))
    grouped = group_dtype_codes(bits)
    return sources, {name: one for name, one in stored.items() if name not in grouped}


def rounded_sources(sources: Sequence[TensorSource], bits: Mapping[str, int]) -> list[TensorSource]:
    """The same tensors, with the weights of some layers, by name, rounded to groups."""
    made: list[TensorSource] = []
    for source in sources:
        layer = source.name.removesuffix(_WEIGHT)
        if layer in bits:
            made += group_sources(source, bits[layer], partial(_rounded, source, bits[layer]))
        else:
            made.append(source)
    return made


def group_sources(
    dense: TensorSource, bits: int, load: Callable[[], WeightGroups]
) -> list[TensorSource]:
    """The two tensors of a weight in groups, with name and shape of a dense one.

    They are written one after the other, and ``load`` is called once for both.
    """
    outputs, inputs = dense.shape
    values, scales = group_shapes(outputs, inputs, bits)
    kept: list[WeightGroups] = []

    def load_values() -> Tensor:
        kept[:] = [load()]
        return kept[0].values

    def load_scales() -> Tensor:
        return kept.pop().scales_OG

    layer = dense.name.removesuffix(_WEIGHT)
    return [
        replace(dense, shape=values, dtype=VALUE_DTYPES[bits], load=load_values),
        TensorSource(layer + _SCALES, scales, torch.float16, load_scales),
    ]


def _dense(
    stored: Mapping[str, StoredTensor], layer: str, bits: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    return dense_weights(load_groups(stored, layer, bits, read_mapped), inputs, dtype)


def _rounded(source: TensorSource, bits: int) -> WeightGroups:
    loaded = source.load()
    assert isinstance(loaded, Tensor)
    if not loaded.isfinite().all():
        raise CheckpointError(f"tensor {source.name} has values that are NaN or infinite")
    return group_weights(loaded, bits)
