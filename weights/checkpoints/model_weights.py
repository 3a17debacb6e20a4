"""Reads a model's weights: mapped on the CPU, or straight into the memory of a GPU."""

import math
import resource
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from engine.model.grouped_weights import GroupFormat, dense_weights
from weights.checkpoints.device_loading import DeviceLoader
from weights.checkpoints.stored_groups import group_dtype_codes, load_groups, stored_formats
from weights.checkpoints.tensor_files import STORED_DTYPES, StoredTensor, read_mapped
from weights.errors import CheckpointError


def mapped_weights(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Weights on mappings of their files, by name, as they are stored.

    Raises:
        CheckpointError: a tensor cannot be read, or a value is NaN or infinite.
    """
    _raise_open_file_limit()
    return {name: _finite(one, read_mapped(one)) for name, one in stored.items()}


def dense_mapped_weights(
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    inputs: Mapping[str, int],
    part: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
) -> dict[str, Tensor]:
    """Weights in ``dtype``, by name; on mappings of their files if they need no conversion.

    Args:
        inputs: the number of inputs of each layer in groups, by the layer's name. The groups of one
            layer at a time are in memory.
        part: returns the part to keep of a weight, by its name; only that part is read.

    Raises:
        CheckpointError: as ``mapped_weights``.
    """
    _raise_open_file_limit()
    weights = {}
    for name, weight in _dense_layers(stored, dtype, inputs, read_mapped):
        # a view would keep the whole weight in memory
        kept = part(name, weight)
        weights[name] = kept.clone() if kept.numel() < weight.numel() else kept
    for name, one in _others(stored, inputs).items():
        weights[name] = _finite(one, part(name, read_mapped(one))).to(dtype)
    return weights


def device_weights(
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    inputs: Mapping[str, int],
) -> dict[str, Tensor]:
    """Weights in ``dtype`` in a device's memory, by name; the device converts them.

    ``inputs`` is that of ``dense_mapped_weights``, but other layers keep their groups. The device
    holds the groups of one layer at a time besides the dense weights.

    Raises:
        CheckpointError: a tensor cannot be read, or a value is NaN or infinite.
        torch.OutOfMemoryError: the device has not enough memory.
    """
    loader = DeviceLoader(device)

    def load_stored(one: StoredTensor) -> Tensor:
        return loader.load(one, STORED_DTYPES[one.dtype])

    weights = dict(_dense_layers(stored, dtype, inputs, load_stored))
    grouped = group_dtype_codes(stored_formats(stored))
    for name, one in _others(stored, inputs).items():
        weights[name] = load_stored(one) if name in grouped else loader.load(one, dtype)
    loader.finish()
    return {name: _finite(stored[name], weight) for name, weight in weights.items()}


def weight_bytes(
    stored: Mapping[str, StoredTensor], dtype: torch.dtype, formats: Mapping[str, GroupFormat]
) -> int:
    """Bytes of all weights in ``dtype``, except those of the layers in ``formats``.

    These have groups of these formats, by the layer's name, whether they are stored so or not.
    """
    grouped, total = stored_formats(stored), 0
    for name, one in stored.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and (layer in grouped or layer in formats):
            outputs, inputs = one.shape
            if layer in grouped:
                inputs = inputs * 8 // grouped[layer].bits  # whole groups
            dense = dtype.itemsize * outputs * inputs
            total += formats[layer].num_bytes(outputs, inputs) if layer in formats else dense
        elif layer not in grouped or kind not in grouped[layer].tensors(0, 0):
            total += dtype.itemsize * math.prod(one.shape)
    return total


def largest_layer_bytes(stored: Mapping[str, StoredTensor]) -> int:
    """Bytes of the groups of the layer with the most; loading to dense weights holds them too."""
    grouped = group_dtype_codes(stored_formats(stored))
    layers: dict[str, int] = {}
    for name in grouped:
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + stored[name].num_bytes
    return max(layers.values(), default=0)


def _others(
    stored: Mapping[str, StoredTensor], inputs: Mapping[str, int]
) -> dict[str, StoredTensor]:
    """The tensors that are not those of the layers in ``inputs``."""
    formats = {layer: one for layer, one in stored_formats(stored).items() if layer in inputs}
    grouped = group_dtype_codes(formats)
    return {name: one for name, one in stored.items() if name not in grouped}


def _dense_layers(
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    inputs: Mapping[str, int],
    load: Callable[[StoredTensor], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Names and dense weights of the layers in groups, whose groups are dropped one by one."""

    def load_finite(one: StoredTensor) -> Tensor:
        return _finite(one, load(one))

    formats = stored_formats(stored)
    for layer, num_inputs in inputs.items():
        # no name for the groups, which would keep them until the next layer is loaded
        yield (
            f"{layer}.weight",
            dense_weights(
                load_groups(stored, layer, formats[layer], load_finite), num_inputs, dtype
            ),
        )


def _finite(stored: StoredTensor, weight: Tensor) -> Tensor:
    """The weight, after a look at its values, which takes little more than reading them."""
    if not weight.numel() or weight.is_meta:
        return weight
    least, most = torch.aminmax(weight)
    if not (math.isfinite(least) and math.isfinite(most)):
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has values that are NaN or infinite; the file is"
            " damaged"
        )
    return weight


def _raise_open_file_limit() -> None:
    """Raise the soft limit of open files, often 1,024, because each mapped tensor may take one."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
