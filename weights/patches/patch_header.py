"""Reads the header of an opened patch.safetensors: its tensors by name."""

import os

from safetensors import SafetensorError, safe_open

from weights.checkpoints.tensor_files import StoredTensor, header_tensors
from weights.errors import PatchError
from weights.patches.opened_folder import OpenedFile

_MAX_HEADER_BYTES = 2**20


def list_tensors(file: OpenedFile) -> dict[str, StoredTensor]:
    """The tensors of a file, whose header has at most 1 MiB.

    Raises:
        PatchError: the file cannot be read, is truncated or is not a safetensors file.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise PatchError(
            f"{file.path}: is not a patch: its header has {length} bytes, but at most"
            f" {_MAX_HEADER_BYTES} are allowed"
        )
    start = file.read(8 + length)
    try:
        _check(start, file.num_bytes)
    except SafetensorError as error:
        problem = f"is truncated or not a safetensors file ({error})"
        raise PatchError(f"{file.path}: {problem}") from None
    return {one.name: one for one in header_tensors(file.path, length, start[8:])}


def _check(start: bytes, num_bytes: int) -> None:
    """Raise SafetensorError unless the tensors fill a file that begins so, without gaps."""
    # the library maps what it checks: it gets a copy of the header in an otherwise empty file,
    # because a file that somebody shortens while it is mapped would end the process
    with open(os.memfd_create("patch-header"), "wb") as copy:
        copy.write(start)
        copy.truncate(num_bytes)
        with safe_open(f"/proc/self/fd/{copy.fileno()}", framework="pt"):
            pass
