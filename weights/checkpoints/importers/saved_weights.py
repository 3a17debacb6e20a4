"""The named tensors of a saved model, each of which an importer takes once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from weights.checkpoints.tensor_files import StoredTensor
from weights.errors import CheckpointError


def named_tensor(path: Path, name: Any, found: Any) -> StoredTensor:
    """An entry of the dictionary of tensors that ``read_saved`` found in a file.

    Raises:
        CheckpointError: the name is no text, or the entry is not a contiguous tensor of floats.
    """
    if not isinstance(name, str) or not isinstance(found, StoredTensor):
        raise CheckpointError(
            f"{path}: tensor {(name if isinstance(name, str) else type(name).__name__)!r:.100}:"
            " is not a contiguous tensor of floats"
        )
    return replace(found, name=name)


class SavedWeights:
    """The tensors of a file that have not been taken yet."""

    def __init__(self, path: Path, tensors: Any) -> None:
        """Take over the dictionary that ``read_saved`` found in ``path``.

        Raises:
            CheckpointError: it is not a dictionary.
        """
        if type(tensors) is not dict:
            raise CheckpointError(f"{path}: has no dictionary named state_dict")
        self._path, self._left = path, dict(tensors)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> StoredTensor:
        """Remove and return a tensor.

        Raises:
            CheckpointError: it is missing, is not a contiguous tensor of floats, or does not have
                ``shape``.
        """
        if name not in self._left:
            raise CheckpointError(f"{self._path}: tensor {name} is missing")
        tensor = named_tensor(self._path, name, self._left.pop(name))
        if shape not in (None, tensor.shape):
            raise CheckpointError(
                f"{self._path}: tensor {name}: expected {shape}, found {tensor.shape}"
            )
        return tensor

    def take_rows(self, name: str, parts: int) -> list[StoredTensor]:
        """Remove a tensor and return equal parts of its rows.

        Raises:
            CheckpointError: as ``take``, or its rows cannot be divided so.
        """
        whole = self.take(name)
        if parts == 1:
            return [whole]
        if not whole.shape or whole.shape[0] % parts:
            raise CheckpointError(
                f"{self._path}: tensor {name}: {whole.shape} has no {parts} equal parts of rows"
            )
        shape = whole.shape[0] // parts, *whole.shape[1:]
        size = whole.num_bytes // parts
        return [
            replace(whole, shape=shape, offset=whole.offset + part * size, num_bytes=size)
            for part in range(parts)
        ]

    def has(self, name: str) -> bool:
        """Whether a tensor, or another entry of that name, has not been taken."""
        return name in self._left

    def discard(self, name: str) -> None:
        """Remove an entry that says nothing about the model, if there is one."""
        self._left.pop(name, None)

    def check_all_taken(self) -> None:
        """Raise CheckpointError for a tensor that is left."""
        for name in self._left:
            raise CheckpointError(f"{self._path}: tensor {name!r:.100}: is not part of this model")
