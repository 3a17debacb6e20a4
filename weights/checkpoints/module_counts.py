"""Checks a model's numbers of layers and experts against its tensors, before it is built."""

from collections.abc import Mapping
from pathlib import Path

from engine.model.config import ModelConfig
from weights.checkpoints.tensor_files import StoredTensor
from weights.errors import CheckpointError


def check_module_counts(
    folder: Path, model: ModelConfig, stored: Mapping[str, StoredTensor]
) -> None:
    """Check that a folder has tensors for all layers and experts of its config.

    A model with wrong numbers is huge even on the meta device, because each layer and each expert
    has modules.

    Raises:
        CheckpointError: a layer has no norm, or the folder has fewer tensors than the experts need.
    """
    for layer in range(model.num_layers):
        if (norm := f"model.layers.{layer}.input_layernorm.weight") not in stored:
            raise CheckpointError(f"{folder}: tensor {norm} is missing")
    num_layers = model.feed_forward.count("moe")
    num_experts = num_layers * (model.mixture.num_experts if model.mixture else 0)
    # each has three matrices
    if 3 * num_experts > len(stored):
        raise CheckpointError(
            f"{folder}: has {len(stored)} tensors, too few for {num_experts} experts of"
            f" {num_layers} layers (num_local_experts)"
        )
