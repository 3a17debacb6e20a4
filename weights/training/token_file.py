"""Tokenised documents on disk, memory-mapped: written once, read by every run on them."""

import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from weights.checkpoints.new_folder import new_folder, write_synced
from weights.errors import DataError

_CHUNK = 1 << 16  # tokens held before they are written


class TokenFile:
    """Documents' tokens, one after another.

    Attributes:
        ids: uint16 or uint32, those of all documents.
        starts: int64, where each document begins, and the end.
    """

    def __init__(self, folder: Path) -> None:
        """Map a folder that ``write`` made.

        Raises:
            DataError: the folder is not whole.
        """
        try:
            dtype = json.loads((folder / "tokens.json").read_text())["dtype"]
            self.starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
            self.ids = np.memmap(folder / "tokens.bin", dtype=np.dtype(dtype), mode="r")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{folder}: no tokenised documents ({error})") from None
        if len(self.starts) < 2 or self.starts[-1] != len(self.ids):
            raise DataError(f"{folder}: tokens.bin has {len(self.ids)} tokens, not as many as said")

    @classmethod
    def write(cls, folder: Path, documents: Iterable[list[int]], vocab_size: int) -> "TokenFile":
        """Write documents under a temporary name, then rename it.

        Raises:
            DataError: there is no document, or the folder cannot be written.
        """
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        try:
            with new_folder(folder) as partial:
                lengths = _write_tokens(partial / "tokens.bin", documents, dtype)
                if not lengths:
                    problem = "there is no document; see data.validation_share"
                    raise DataError(f"{folder.name}: {problem}")
                starts = np.cumsum([0, *lengths], dtype=np.int64)
                write_synced(partial / "starts.bin", starts.tobytes())
                described = json.dumps({"dtype": np.dtype(dtype).name})
                write_synced(partial / "tokens.json", described.encode())
        except OSError as error:
            reason = error.strerror or error  # numpy's have no number
            raise DataError(f"{folder}: cannot be written ({reason})") from None
        return cls(folder)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.starts) - 1


def _write_tokens(path: Path, documents: Iterable[list[int]], dtype: type) -> "array[int]":
    lengths = array("q")
    held: list[int] = []
    with open(path, "xb") as file:
        for document in documents:
            lengths.append(len(document))
            held += document
            if len(held) >= _CHUNK:
                np.array(held, dtype=dtype).tofile(file)
                held.clear()
        np.array(held, dtype=dtype).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return lengths
