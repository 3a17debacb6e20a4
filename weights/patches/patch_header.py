"""Reads the header of an opened patch.safetensors: its tensors by name."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from weights.checkpoints.tensor_files import StoredTensor, header_tensors
from weights.errors import PatchError, PatchReadError
from weights.patches.opened_folder import OpenedFile

_MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class PatchHeader:
    """The header of a file, whose tensors end where the file ends.

    Attributes:
        file: the file.
        start: the bytes before its data.
        tensors: its tensors, by name; names are printable.
    """

    file: OpenedFile
    start: bytes
    tensors: Mapping[str, StoredTensor]

    def check(self) -> None:
        """Check that the tensors have the bytes of their shapes, without gaps or overlaps.

        This takes address space for the whole file: sizes must have been checked before.

        Raises:
            PatchError: they do not.
            PatchReadError: address space is missing.
        """
        try:
            # the library maps what it checks: it gets a copy of the header in an otherwise empty
            # file, because a file that somebody shortens while it is mapped would end the process
            with open(os.memfd_create("patch-header"), "wb") as copy:
                copy.write(self.start)
                copy.truncate(self.file.num_bytes)
                with safe_open(f"/proc/self/fd/{copy.fileno()}", framework="pt"):
                    pass
        except SafetensorError as error:
            raise _not_safetensors(self.file, error) from None
        except (MemoryError, RuntimeError, OSError) as error:
            raise PatchReadError(f"{self.file.path}: cannot be checked ({error})") from None


def read_header(file: OpenedFile) -> PatchHeader:
    """Read a header of at most 1 MiB; only ``PatchHeader.check`` checks it completely.

    Raises:
        PatchError: the file is truncated or is not a safetensors file.
        PatchReadError: the file cannot be read.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise PatchError(
            f"{file.path}: is not a patch: its header has {length} bytes, but at most"
            f" {_MAX_HEADER_BYTES} are allowed"
        )
    start = file.read(8 + length)
    try:
        tensors = header_tensors(file.path, length, start[8:])
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(file, error) from None
    end = max((one.offset + one.num_bytes for one in tensors), default=8 + length)
    if end != file.num_bytes:
        raise _not_safetensors(file, f"{file.num_bytes} bytes instead of {end}")
    return PatchHeader(file, start, {one.name: one for one in tensors})


def _not_safetensors(file: OpenedFile, problem: object) -> PatchError:
    return PatchError(f"{file.path}: is truncated or not a safetensors file ({problem})")
