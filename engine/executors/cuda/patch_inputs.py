"""Row patches among a step's inputs: the patches that each token uses, and their addresses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.config import EngineConfig
from engine.executors.batch import Batch
from engine.executors.cuda.buckets import StepShape
from engine.model.config import ModelConfig
from engine.request import MAX_PATCH_USES
from memory_ops.patches.device_patches import DevicePatches

_NO_ADDRESS = 0


def patched_layers(model: ModelConfig, config: EngineConfig) -> tuple[int, ...]:
    """The memory layers that row patches may change."""
    return model.memory_layers if config.max_patches and model.takes_patches else ()


def patch_input_sizes(shape: StepShape, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs; see ``InputLayout``. Every sequence has space for all its uses."""
    if not num_layers:
        return {}
    num_uses = shape.sequences * MAX_PATCH_USES
    return {
        "patch_spans": (shape.tokens, 2),
        "patch_scales": (num_uses,),
        "patch_addresses": (num_layers, num_uses),
    }


def write_patches(
    out: Mapping[str, NDArray[Any]], shape: StepShape, batch: Batch, layers: Sequence[int]
) -> None:
    """Write the patches of a batch for these layers, those that inputs have addresses for."""
    if not layers:
        assert not any(batch.patches)
        return
    spans_T2, num_tokens = out["patch_spans"], len(batch.ids_T)
    spans_T2[:] = 0
    if not any(batch.patches):
        return
    counts_S = np.array([len(uses) for uses in batch.patches])
    ends_S = counts_S.cumsum()
    spans_S2 = np.stack((ends_S - counts_S, ends_S), axis=1)
    spans_T2[:num_tokens] = spans_S2.repeat(np.diff(batch.query_starts), axis=0)
    if shape.is_decode:
        # the padding of a decode repeats the whole first sequence
        spans_T2[num_tokens:] = spans_T2[0]
    uses = (use for uses in batch.patches for use in uses)
    for number, (patch, scale) in enumerate(uses):
        out["patch_scales"][number] = scale
        out["patch_addresses"][:, number] = [
            patch.layers[layer].words.data_ptr() if layer in patch.layers else _NO_ADDRESS
            for layer in layers
        ]


def device_patches(
    inputs: Mapping[str, Tensor], layers: Sequence[int], part: slice, num_counted_1: Tensor
) -> Mapping[int, DevicePatches]:
    """The patches of a part of a step's tokens, by layer; none if the inputs have no space for
    patches. ``num_counted_1`` is the part's number of tokens without padding."""
    if "patch_spans" not in inputs:
        return {}
    spans_T2, scales_U = inputs["patch_spans"][part], inputs["patch_scales"]
    return {
        layer: DevicePatches(spans_T2, addresses_U, scales_U, num_counted_1)
        for layer, addresses_U in zip(layers, inputs["patch_addresses"], strict=True)
    }
