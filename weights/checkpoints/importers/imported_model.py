"""A model that an importer has read, ready to be written as a checkpoint folder."""

from dataclasses import dataclass

from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.tensor_files import TensorSource


@dataclass(frozen=True)
class ImportedModel:
    """A model ready to be saved by ``weights.checkpoints.checkpoint.save_checkpoint``."""

    config: CheckpointConfig
    sources: list[TensorSource]
    extra_files: dict[str, bytes]
