"""The identity of a model for row patches: hashes of its tables and of its other weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.model.config import ModelConfig
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.table_files import table_shape
from weights.checkpoints.table_origin import applied_patches, table_origin
from weights.checkpoints.tensor_files import StoredTensor
from weights.checkpoints.weights_hash import weights_hash
from weights.errors import PatchError
from weights.patches.description import PatchDescription


@dataclass(frozen=True)
class ModelIdentity:
    """The hashes and shapes that a patch of a model must have.

    Attributes:
        origins: origin of each table, by table name.
        row_choice: hash of all weights outside tables: they choose the rows that a token reads.
        shapes: R and V of each table, by table name.
    """

    origins: Mapping[str, str]
    row_choice: str
    shapes: Mapping[str, tuple[int, int]]

    def check(self, patch: PatchDescription, file: Path) -> None:
        """Raise PatchError unless the patch in ``file`` was made for this model.

        The message names both hashes, or both shapes.
        """
        for name, shape in patch.shapes.items():
            if name not in self.shapes:
                known = ", ".join(self.shapes)
                raise PatchError(f"{file}: shapes.{name}: the model's tables are {known}")
            _check_equal(f"{file}: shapes.{name}", list(shape), list(self.shapes[name]))
        _check_equal(f"{file}: row_choice", patch.row_choice, self.row_choice)
        for name, origin in patch.origins.items():
            _check_equal(f"{file}: origins.{name}", origin, self.origins[name])


def model_identity(folder: Path) -> ModelIdentity:
    """The identity of a checkpoint folder; reads all dense weights once, one tensor at a time.

    Tables are read only if their files have neither an origin nor a checksum.

    Raises:
        PatchError: the model has no memory layers, or one that a patch cannot change.
        CheckpointError: the folder cannot be read.
    """
    config, stored = open_checkpoint(folder)
    check_patchable(config.model, folder)
    tables = [stored.pop(name) for name in config.model.table_names]
    return ModelIdentity(
        origins={one.name: table_origin(one) for one in tables},
        row_choice=weights_hash(stored.values()),
        shapes={one.name: _matrix_shape(one) for one in tables},
    )


def base_patches_of(tables: Iterable[StoredTensor]) -> dict[str, list[str]]:
    """Content hashes of the patches that tables hold already, without tables that hold none.

    Raises:
        CheckpointError: one is not a hash.
    """
    found = {one.name: applied_patches(one) for one in tables}
    return {name: hashes for name, hashes in found.items() if hashes}


def check_patchable(config: ModelConfig, folder: Path) -> None:
    """Raise PatchError unless all memory layers are linear in their rows; PEER is not."""
    if config.patch_refusal is not None:
        raise PatchError(f"{folder}: {config.patch_refusal}")


def _matrix_shape(table: StoredTensor) -> tuple[int, int]:
    num_rows, value_dim = table_shape(table)
    return num_rows, value_dim


def _check_equal(where: str, patch: object, model: object) -> None:
    if patch != model:
        raise PatchError(f"{where}: the patch was made for {patch}, but the model has {model}")
