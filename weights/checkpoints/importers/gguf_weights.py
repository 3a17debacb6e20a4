"""Tensors of a GGUF file as tensors of a checkpoint folder."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from engine.model.grouped_weights import GroupFormat
from weights.checkpoints.importers.gguf_groups import GROUP_FORMATS, block_groups
from weights.checkpoints.stored_groups import group_sources, rounded_sources
from weights.checkpoints.tensor_files import TensorSource
from weights.errors import CheckpointError

_KINDS = gguf.GGMLQuantizationType
_FLOATS = {
    _KINDS.F32: torch.float32,
    _KINDS.F16: torch.float16,
    _KINDS.BF16: torch.bfloat16,
}
Reorder = Callable[[Tensor], Tensor]


def dense_source(
    name: str, tensor: Any, dtype: torch.dtype | None, reorder: Reorder
) -> TensorSource:
    """A tensor that is dequantised to ``dtype`` when it is written, its rows reordered.

    Without a ``dtype`` it keeps the one in the file, or gets bfloat16 if it is quantised.

    Raises:
        CheckpointError: its quantisation is not supported.
    """
    shape = tuple(int(size) for size in reversed(tensor.shape))
    _check_quantisation(tensor)

    def load() -> Tensor:
        values = gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
        return reorder(torch.from_numpy(values.reshape(shape)))

    dtype = dtype or _FLOATS.get(tensor.tensor_type, torch.bfloat16)
    return TensorSource(name, shape, dtype, load)


def weight_sources(name: str, tensor: Any, reorder: Reorder) -> list[TensorSource]:
    """A layer's weight, in groups if it is quantised.

    Formats of ``gguf_groups`` stay groups. Others are dequantised and rounded to 8 bits. Weights
    that are not quantised keep their dtype.

    Raises:
        CheckpointError: its quantisation is not supported.
    """
    dense = dense_source(name, tensor, None, reorder)
    if tensor.tensor_type in _FLOATS:
        return [dense]
    group_format = GROUP_FORMATS.get(tensor.tensor_type)
    if group_format is None:
        return rounded_sources([dense], {name.removesuffix(".weight"): GroupFormat(8)})
    return group_sources(dense, group_format, partial(block_groups, tensor, reorder))


def _check_quantisation(tensor: Any) -> None:
    _, num_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        gguf.dequantize(np.zeros((1, num_bytes), dtype=np.uint8), tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise CheckpointError(
            f"tensor {tensor.name}: quantisation {kind} is not supported"
        ) from None
