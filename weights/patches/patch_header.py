"""Reads the header of an opened patch.safetensors: its tensors by name."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from weights.checkpoints.tensor_files import StoredTensor, header_tensors
from weights.errors import PatchError, PatchReadError
from weights.patches.opened_folder import OpenedFile

_MAX_HEADER_BYTES = 2**20
_MAX_DIMS, _MAX_SIZE = 8, 2**63 - 1


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
        entries = json.loads(start[8:])
        _check_entries(entries)
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(file, error) from None
    tensors = header_tensors(file.path, length, start[8:])
    end = max((one.offset + one.num_bytes for one in tensors), default=8 + length)
    if end != file.num_bytes:
        raise _not_safetensors(file, f"{file.num_bytes} bytes instead of {end}")
    return PatchHeader(file, start, {one.name: one for one in tensors})


def _check_entries(header: object) -> None:
    """Raise ValueError unless a header has the form that ``header_tensors`` expects."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not name.isprintable():
            raise ValueError(f"the tensor name {name[:80]!a} is not printable")
        if not isinstance(entry, dict) or not (
            re.fullmatch("[A-Z0-9_]{1,16}", str(entry.get("dtype")))
            and _are_sizes(entry.get("shape"), _MAX_DIMS)
            and _are_sizes(entry.get("data_offsets"), 2)
            and len(entry["data_offsets"]) == 2
        ):
            raise ValueError(f"tensor {name[:80]} has no valid dtype, shape and data_offsets")


def _are_sizes(values: object, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(one) is int and 0 <= one <= _MAX_SIZE for one in values)
    )


def _not_safetensors(file: OpenedFile, problem: object) -> PatchError:
    return PatchError(f"{file.path}: is truncated or not a safetensors file ({problem})")
