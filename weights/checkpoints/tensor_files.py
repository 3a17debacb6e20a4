"""Safetensors files: what a folder holds, mapped, read whole or in parts."""

import hashlib
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RECORDS_DTYPE = "U8"
STORED_DTYPES = DTYPES | {RECORDS_DTYPE: torch.uint8}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_READ_CHUNK = 1 << 30
_PART_BYTES = 1 << 22
_LEAST_MAPPED = 1 << 16
# before Python 3.13 a mapping keeps a descriptor that it has no use for
_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file: ``num_bytes`` from ``offset``, dtype in safetensors' code.

    ``metadata`` is the file's.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorSource:
    """A tensor that can be made when its turn to be written comes.

    ``load`` gives it whole, or in parts along its first dimension, each good until the next is
    asked for. ``metadata`` is added to that of its file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor | Iterable[Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's dense and table files, by name. Reads headers only.

    Raises:
        CheckpointError: no safetensors file, a truncated or foreign one, or a tensor that two files
            hold. Pickled weights are never opened.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in [*_dense_files(folder), *sorted(folder.glob("table-*.safetensors"))]:
        for tensor in list_file(file):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise CheckpointError(f"{file}: tensor {tensor.name} stands in {other} too")
            tensors[tensor.name] = tensor
    return tensors


def read_mapped(stored: StoredTensor) -> Tensor:
    """A tensor on a mapping of its own, whose pages are read when they are first used.

    They leave memory when the tensor does, not with the last tensor of its file; writes stay
    private to this process. A small tensor is read at once: a mapping takes a descriptor.

    Raises:
        CheckpointError: the file cannot be opened or mapped, or ends too early.
    """
    if stored.num_bytes < _LEAST_MAPPED:
        tensor = torch.empty(stored.shape, dtype=STORED_DTYPES[stored.dtype])
        read_into(stored, tensor)
        return tensor
    before = stored.offset % mmap.ALLOCATIONGRANULARITY
    try:
        with open(stored.file, "rb") as file:
            memory = mmap.mmap(
                file.fileno(),
                before + stored.num_bytes,
                offset=stored.offset - before,
                access=mmap.ACCESS_COPY,
                **_NO_DESCRIPTOR,
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{stored.file}: tensor {stored.name}: {error}") from None
    values = torch.frombuffer(
        memory, dtype=STORED_DTYPES[stored.dtype], count=math.prod(stored.shape), offset=before
    )
    return values.view(stored.shape)


def read_into(stored: StoredTensor, target: Tensor) -> None:
    """Fill a contiguous CPU tensor of the same dtype and shape from the file.

    Raises:
        CheckpointError: the file cannot be read, or ends too early.
    """
    try:
        with open(stored.file, "rb", buffering=0) as file:
            file.seek(stored.offset)
            _fill(file, target, stored)
    except OSError as error:
        raise CheckpointError(f"{stored.file}: tensor {stored.name}: {error.strerror}") from None


def read_parts(
    stored: StoredTensor, target: Tensor | None = None, *, verify: bool = False
) -> Iterator[Tensor]:
    """A tensor's rows in order, some at a time, read as they are asked for.

    They lie in ``target``, a contiguous CPU tensor of the same dtype and shape; without one, each
    part in the memory of the part before. The page cache gives them up behind the reading.

    Raises:
        CheckpointError: the file cannot be read, or ends too early; or ``verify`` is set, and it
            has no checksum of the tensor, or that of other data.
    """
    where = f"{stored.file}: tensor {stored.name}"
    expected = stored.metadata.get(checksum_key(stored.name))
    if verify and expected is None:
        raise CheckpointError(f"{where}: has no checksum; `memplus convert` makes a copy with one")
    checksum = hashlib.sha256()
    num_rows = stored.shape[0]
    at_once = max(1, _PART_BYTES * num_rows // max(1, stored.num_bytes))
    if target is None:
        shape = (min(at_once, num_rows), *stored.shape[1:])
        buffer = torch.empty(shape, dtype=STORED_DTYPES[stored.dtype])
    try:
        with open(stored.file, "rb", buffering=0) as file:
            file.seek(stored.offset)
            for first in range(0, num_rows, at_once):
                count = min(at_once, num_rows - first)
                part = buffer[:count] if target is None else target[first : first + count]
                _fill(file, part, stored)
                _forget(file, part.nbytes)
                if verify:
                    checksum.update(memory_of(part))
                yield part
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}") from None
    if verify and checksum.hexdigest() != expected:
        raise CheckpointError(f"{where}: its data are not those that its checksum is of")


def has_checksum(stored: StoredTensor) -> bool:
    """Whether its file says what its data were when they were written."""
    return checksum_key(stored.name) in stored.metadata


def checksum_key(name: str) -> str:
    """Where a file's metadata have the checksum of this tensor's data, in hexadecimal digits."""
    return f"sha256:{name}"


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    # numpy knows no bfloat16, so the memory is handed over as bytes
    return tensor.view(-1).view(torch.uint8).numpy().data


def _fill(file: BinaryIO, target: Tensor, stored: StoredTensor) -> None:
    memory = memory_of(target)
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done : done + _READ_CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{stored.file}: ends within tensor {stored.name}")
        done += count


def _forget(file: BinaryIO, num_bytes: int) -> None:
    """Let the page cache give up what was just read: once is enough, and others need the room."""
    end = file.tell()
    # of a page that two reads share, only all of it can be given up
    start = (end - num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


def _dense_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(map(os.fspath, weight_map.values())))
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{index}: has no weight_map of tensor and file names") from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError(f"{index}: there is no file {name!r} beside it")
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        return files
    pickled = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: has no model.safetensors, only {pickled[0]}, which may be a pickle and is"
            " never opened; save the weights as safetensors"
        )
    raise CheckpointError(f"{folder}: has no model.safetensors")


def list_file(path: Path) -> list[StoredTensor]:
    """Every tensor of one file, from its header.

    Raises:
        CheckpointError: the file is not whole.
    """
    try:
        # the library checks that the offsets are in order, without gaps, and end with the file
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); pickled or truncated weights are"
            " not read"
        ) from None
    metadata = header.pop("__metadata__", {})
    return [
        StoredTensor(
            name=name,
            file=path,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            metadata=metadata,
        )
        for name, entry in header.items()
    ]
