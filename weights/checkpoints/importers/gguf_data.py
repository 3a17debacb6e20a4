"""Data of a tensor of a GGUF file, read from the file on each use."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weights.errors import CheckpointError


@dataclass(frozen=True)
class GgufData:
    """Values or blocks of one tensor; ``numpy.array`` reads them.

    A mapping would end the process by a signal if the file became shorter.

    Attributes:
        name: the tensor's name.
        status: the file's status when it was opened.
        offset: the first byte in the file.
        shape: sizes of the array.
        dtype: type of its elements.
    """

    name: str
    file: Path
    status: os.stat_result
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read the data.

        Raises:
            CheckpointError: the file cannot be read, ends too early or is not the one that was
                opened.
        """
        where = f"{self.file}: tensor {self.name}"
        count = math.prod(self.shape)
        try:
            with open(self.file, "rb") as file:
                if not os.path.samestat(os.fstat(file.fileno()), self.status):
                    raise CheckpointError(f"{where}: the file was replaced while it was read")
                found = np.fromfile(file, self.dtype, count, offset=self.offset)
        except OSError as error:
            raise CheckpointError(f"{where}: {error.strerror}") from None
        if len(found) < count:
            raise CheckpointError(f"{self.file}: ends within tensor {self.name}")
        return found.reshape(self.shape).astype(dtype or self.dtype, copy=False)
