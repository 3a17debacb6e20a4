"""Memory-mapped file of tokenised documents."""

import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from weights.checkpoints.new_folder import new_folder, write_synced
from weights.errors import DataError

_CHUNK = 1 << 16  # tokens buffered before they are written


class TokenFile:
    """Concatenated tokens of documents.

    Attributes:
        ids: uint16 or uint32 token ids of all documents.
        starts: int64 offset of each document, and the total length.
    """

    def __init__(self, folder: Path) -> None:
        """Map a folder that ``write`` created.

        Raises:
            DataError: a file is missing or invalid.
        """
        try:
            dtype = json.loads((folder / "tokens.json").read_text())["dtype"]
            self.starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
            self.ids = np.memmap(folder / "tokens.bin", dtype=np.dtype(dtype), mode="r")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{folder}: has no tokenised documents ({error})") from None
        if len(self.starts) < 2 or self.starts[-1] != len(self.ids):
            raise DataError(
                f"{folder}: tokens.bin has {len(self.ids)} tokens, which does not match starts.bin"
            )

    @classmethod
    def write(cls, folder: Path, documents: Iterable[list[int]], vocab_size: int) -> "TokenFile":
        """Write documents to a new folder, atomically.

        Raises:
            DataError: there are no documents, or the folder cannot be written.
        """
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        try:
            with new_folder(folder) as partial:
                lengths = _write_tokens(partial / "tokens.bin", documents, dtype)
                if not lengths:
                    problem = "no documents; add some or lower data.validation_share"
                    raise DataError(f"{folder.name}: {problem}")
                starts = np.cumsum([0, *lengths], dtype=np.int64)
                write_synced(partial / "starts.bin", starts.tobytes())
                description = json.dumps({"dtype": np.dtype(dtype).name})
                write_synced(partial / "tokens.json", description.encode())
        except OSError as error:
            reason = error.strerror or error  # numpy's errors have no strerror
            raise DataError(f"{folder}: cannot be written ({reason})") from None
        return cls(folder)

    def check_pairs(self, name: str) -> None:
        """Raise DataError with ``name`` unless a document has a token that follows another."""
        if not (np.diff(self.starts) > 1).any():
            raise DataError(f"{name}: no document has two tokens")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1


def _write_tokens(path: Path, documents: Iterable[list[int]], dtype: type) -> "array[int]":
    lengths = array("q")
    buffered: list[int] = []
    with open(path, "xb") as file:
        for document in documents:
            lengths.append(len(document))
            buffered += document
            if len(buffered) >= _CHUNK:
                np.array(buffered, dtype=dtype).tofile(file)
                buffered.clear()
        np.array(buffered, dtype=dtype).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return lengths
