"""Safetensors files: what a folder holds, and a writer that holds one tensor at a time."""

import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RECORDS_DTYPE = "U8"
_STORED = DTYPES | {RECORDS_DTYPE: torch.uint8}
_CODES = {dtype: code for code, dtype in _STORED.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# table rows start on a page, so that direct reads and maps of them are aligned
_DATA_ALIGNMENT = 4096
_READ_CHUNK = 1 << 30
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

    ``metadata`` is added to that of its file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
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
        tensor = torch.empty(stored.shape, dtype=_STORED[stored.dtype])
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
        memory, dtype=_STORED[stored.dtype], count=math.prod(stored.shape), offset=before
    )
    return values.view(stored.shape)


def read_into(stored: StoredTensor, target: Tensor) -> None:
    """Fill a contiguous CPU tensor of the same dtype and shape from the file.

    Raises:
        CheckpointError: the file cannot be read, or ends too early.
    """
    try:
        _fill(stored, target)
    except OSError as error:
        raise CheckpointError(f"{stored.file}: tensor {stored.name}: {error.strerror}") from None


def _fill(stored: StoredTensor, target: Tensor) -> None:
    # numpy knows no bfloat16, so the memory is handed over as bytes
    memory = target.view(torch.uint8).flatten().numpy().data
    with open(stored.file, "rb", buffering=0) as file:
        file.seek(stored.offset)
        done = 0
        while done < len(memory):
            count = file.readinto(memory[done : done + _READ_CHUNK])
            if not count:
                raise CheckpointError(f"{stored.file}: ends within tensor {stored.name}")
            done += count


def write_tensors(path: Path, sources: list[TensorSource], written: Callable[[int], Any]) -> None:
    """Write a safetensors file, one tensor in memory at a time, its data on a page boundary.

    ``written`` is told the bytes of every tensor once they are in the file; the file is fsynced.
    """
    metadata = {"format": "pt"}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for source in sources:
        metadata |= source.metadata
        start, end = end, end + source.dtype.itemsize * torch.Size(source.shape).numel()
        header[source.name] = {
            "dtype": _CODES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in sources:
            tensor = source.load().to(source.dtype).contiguous()
            assert tuple(tensor.shape) == source.shape, source.name
            data = tensor.view(-1).view(torch.uint8).numpy().data
            file.write(data)
            written(data.nbytes)
        file.flush()
        os.fsync(file.fileno())


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
