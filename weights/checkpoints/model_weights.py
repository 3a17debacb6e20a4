"""Reads a model's weights: mapped on the CPU, or straight into the memory of a GPU."""

import math
import resource
from collections.abc import Mapping

import torch
from torch import Tensor

from weights.checkpoints.device_loading import DeviceLoader
from weights.checkpoints.stored_groups import group_tensors, stored_formats
from weights.checkpoints.tensor_files import STORED_DTYPES, StoredTensor, read_mapped
from weights.errors import CheckpointError


def mapped_weights(
    stored: Mapping[str, StoredTensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Weights on mappings of their files, by name.

    ``dtype`` converts those that have another dtype; None keeps all as they are stored.

    Raises:
        CheckpointError: a tensor cannot be read, or a value is NaN or infinite.
    """
    _raise_open_file_limit()
    weights = {name: _finite(one, read_mapped(one)) for name, one in stored.items()}
    if dtype is None:
        return weights
    return {name: weight.to(dtype) for name, weight in weights.items()}


def device_weights(
    stored: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Weights in a device's memory, by name; the device converts them to ``dtype``.

    Weights in groups stay as they are stored.

    Raises:
        CheckpointError: a tensor cannot be read, or a value is NaN or infinite.
        torch.OutOfMemoryError: the device has not enough memory.
    """
    loader = DeviceLoader(device)
    grouped = group_tensors(stored_formats(stored))
    weights = {
        name: loader.load(one, STORED_DTYPES[one.dtype] if name in grouped else dtype)
        for name, one in stored.items()
    }
    loader.finish()
    return {name: _finite(stored[name], weight) for name, weight in weights.items()}


def weight_bytes(
    stored: Mapping[str, StoredTensor], dtype: torch.dtype, *, keep_groups: bool
) -> int:
    """Bytes of all weights in ``dtype``; those in groups as they are stored, or dense too."""
    formats = stored_formats(stored)
    total = 0
    for name, one in stored.items():
        layer, _, kind = name.rpartition(".")
        if layer not in formats or kind == "bias":
            total += dtype.itemsize * math.prod(one.shape)
        elif keep_groups:
            total += one.num_bytes
        elif kind == "weight":
            total += dtype.itemsize * math.prod(one.shape) * 8 // formats[layer].bits
    return total


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
