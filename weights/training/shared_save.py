"""Writes tensors of which every process holds a part into the files of one checkpoint."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from weights.checkpoints.tensor_files import TensorSource
from weights.checkpoints.tensor_part import TensorPart, write_part
from weights.errors import CheckpointError, TrainingError
from weights.training.replicas import Replicas

logger = logging.getLogger(__name__)
_DONE, _FAILED = "done", "failed"


class SharedSave:
    """One checkpoint, written by all processes.

    The first process writes files with whole tensors. When it reaches a tensor that is divided, it
    names the tensor, the file and the offset, and all processes write their parts into the file.
    So the run folder must be on a file system that all processes share.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Mapping[str, TensorPart]], replicas: Replicas
    ) -> None:
        """Write below ``folder``, whose path may differ between machines.

        ``files`` are the tensors by any names of files and by their own names.
        """
        self._folder, self._files, self._replicas = folder, files, replicas

    def sources(self, file: str) -> list[TensorSource]:
        """The tensors of one of the files, for the first process to write."""
        return [
            TensorSource(
                name,
                part.shape,
                part.tensor.dtype,
                part.tensor.cpu,
                store=None if part.shard is None else partial(self._store, file, name),
            )
            for name, part in self._files[file].items()
        ]

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """In the first process: let the others go on when the checkpoint is done, or has failed."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(TrainingError):  # another process has ended
                self._replicas.first_text(_FAILED)
            raise
        self._replicas.first_text(_DONE)

    def follow(self, target: Path) -> None:
        """In the other processes: write parts until the first process is done.

        Raises:
            CheckpointError: a process failed to write.
        """
        while (request := self._replicas.first_text("")) not in (_DONE, _FAILED):
            file, name, path, offset = json.loads(request)
            self._write(file, name, self._folder / path, offset)
        if request == _FAILED:
            raise CheckpointError(f"{target}: cannot be written; see the first process's error")

    def _store(self, file: str, name: str, path: Path, offset: int) -> None:
        place = str(path.relative_to(self._folder))
        self._replicas.first_text(json.dumps([file, name, place, offset]))
        if self._write(file, name, path, offset):
            raise OSError(0, f"tensor {name}: a process failed; see its log")

    def _write(self, file: str, name: str, path: Path, offset: int) -> bool:
        """Write this process's part; return whether any process failed."""
        has_failed = False
        try:
            write_part(path, offset, self._files[file][name], self._replicas)
        except OSError as error:
            has_failed = True
            logger.error("%s: tensor %s: cannot be written (%s)", path, name, error.strerror)
        return self._replicas.any_of(has_failed)
