"""Lists, maps and reads the tensors of safetensors files."""

import hashlib
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.checkpoints.safetensors_header import MAX_HEADER_BYTES, parse_header
from weights.checkpoints.shard_index import INDEX_FILE, read_weight_map, shard_file
from weights.errors import CheckpointError
from weights.text_files import regular_file_bytes

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RECORDS_DTYPE = "U8"
_INTEGERS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
STORED_DTYPES = DTYPES | {RECORDS_DTYPE: torch.uint8} | _INTEGERS
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_READ_CHUNK = 1 << 30
PART_BYTES = 1 << 22
_MIN_MAPPED_BYTES = 1 << 16
# mappings need no descriptor, but before Python 3.13 they keep one
_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``num_bytes`` at ``offset``; ``dtype`` is a safetensors code.

    ``metadata`` is the metadata of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    def row_range(self, rows: range) -> "StoredTensor":
        """Some contiguous rows, as a stored tensor."""
        row_bytes = self.num_bytes // self.shape[0]
        return replace(
            self,
            shape=(len(rows), *self.shape[1:]),
            offset=self.offset + rows.start * row_bytes,
            num_bytes=len(rows) * row_bytes,
        )


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is loaded only when it is written.

    ``load`` returns the whole tensor, or parts along its first dimension; each part is valid until
    the next one is requested. ``metadata`` is added to the metadata of the file. ``store``, if
    given, is called instead of ``load``: it writes the tensor into the file of this path, from this
    offset in bytes on.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor | Iterable[Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    store: Callable[[Path, int], None] | None = None


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's dense and table files, by name. Reads headers only.

    Raises:
        CheckpointError: the folder has no safetensors file, a file is truncated or invalid, two
            files have a tensor of the same name, or the index names files outside the folder or
            tensors that its files lack. Pickled weights are never opened.
    """
    index = folder / INDEX_FILE
    weight_map = read_weight_map(index) if index.exists() else None
    if weight_map is None:
        dense = _dense_files(folder)
    else:
        dense = [shard_file(index, name) for name in sorted(set(weight_map.values()))]
    tensors: dict[str, StoredTensor] = {}
    for file in [*dense, *sorted(folder.glob("table-*.safetensors"))]:
        for tensor in list_file(file):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise CheckpointError(f"{file}: tensor {tensor.name} is in {other} too")
            tensors[tensor.name] = tensor
    for name, shard in (weight_map or {}).items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{index}: tensor {name} is not in {shard}")
    return tensors


def read_mapped(stored: StoredTensor) -> Tensor:
    """A tensor on a private mapping, whose pages are read on first use.

    Each tensor has a separate mapping, so that its pages are freed with it. Writes are not seen by
    other processes. A small tensor is read at once, because a mapping may take a descriptor.

    Raises:
        CheckpointError: the file cannot be opened or mapped, or ends too early.
    """
    if stored.num_bytes < _MIN_MAPPED_BYTES:
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
    stored: StoredTensor,
    target: Tensor | None = None,
    *,
    buffer: Callable[[], Tensor] | None = None,
    verify: bool = False,
) -> Iterator[Tensor]:
    """Read a tensor's rows in order, in parts of at most 4 MiB, or of one row if it is larger.

    Parts are views of ``target``, a contiguous CPU tensor of the same dtype and shape. Without it,
    ``buffer`` returns the bytes that each part is read into; by default each part overwrites the
    previous one. What was read is dropped from the page cache.

    Raises:
        CheckpointError: the file cannot be read or ends too early; or ``verify`` is set, and the
            tensor has no checksum or does not match it.
    """
    where = f"{stored.file}: tensor {stored.name}"
    expected = stored.metadata.get(checksum_key(stored.name))
    if verify and expected is None:
        raise CheckpointError(
            f"{where}: has no checksum; run `memplus convert` to make a copy with one"
        )
    checksum = hashlib.sha256()
    num_rows = stored.shape[0]
    rows_per_part = max(1, min(PART_BYTES * num_rows // max(1, stored.num_bytes), num_rows))
    if target is None and buffer is None:
        reused = torch.empty(rows_per_part * _row_bytes(stored), dtype=torch.uint8)
    try:
        with open(stored.file, "rb", buffering=0) as file:
            file.seek(stored.offset)
            for first in range(0, num_rows, rows_per_part):
                count = min(rows_per_part, num_rows - first)
                if target is None:
                    part = _as_rows(buffer() if buffer else reused, stored, count)
                else:
                    part = target[first : first + count]
                _fill(file, part, stored)
                _drop_from_page_cache(file, part.nbytes)
                if verify:
                    checksum.update(tensor_bytes(part))
                yield part
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}") from None
    if verify and checksum.hexdigest() != expected:
        raise CheckpointError(f"{where}: the data do not match its checksum; the file is damaged")


def has_checksum(stored: StoredTensor) -> bool:
    """Whether the file has a checksum of this tensor's data."""
    return checksum_key(stored.name) in stored.metadata


def checksum_key(name: str) -> str:
    """Metadata key of a tensor's SHA-256 checksum, which is stored in hexadecimal."""
    return f"sha256:{name}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    # view as bytes first, because numpy has no bfloat16
    return tensor.view(-1).view(torch.uint8).numpy().data


def _row_bytes(stored: StoredTensor) -> int:
    return STORED_DTYPES[stored.dtype].itemsize * math.prod(stored.shape[1:])


def _as_rows(memory: Tensor, stored: StoredTensor, count: int) -> Tensor:
    """The first bytes of a buffer as ``count`` rows of a tensor."""
    values = memory[: count * _row_bytes(stored)].view(STORED_DTYPES[stored.dtype])
    return values.view(count, *stored.shape[1:])


def _fill(file: BinaryIO, target: Tensor, stored: StoredTensor) -> None:
    memory = tensor_bytes(target)
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done : done + _READ_CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{stored.file}: ends within tensor {stored.name}")
        done += count


def _drop_from_page_cache(file: BinaryIO, num_bytes: int) -> None:
    """Drop what was just read from the page cache, because it is read only once."""
    end = file.tell()
    # start at a page boundary: the kernel drops only whole pages
    start = (end - num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


def list_file(path: Path) -> list[StoredTensor]:
    """Every tensor of one file, from its header.

    Raises:
        CheckpointError: the file is truncated or is not a safetensors file, or its header has more
            than 16 MiB.
    """
    size = regular_file_bytes(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
            if 8 + length > size:
                raise ValueError(f"it has {size} bytes, and its header needs {8 + length}")
            content = file.read(length)
        tensors = header_tensors(path, length, content)
        # the library checks that the tensors fill the file without gaps or overlap
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is truncated or not a safetensors file ({error}); pickled weights are not"
            " supported"
        ) from None
    return tensors


def header_tensors(path: Path, length: int, content: bytes) -> list[StoredTensor]:
    """The tensors in a file's header of ``length`` bytes; raises as ``parse_header``."""
    entries, metadata = parse_header(content)
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
        for name, entry in entries.items()
    ]


def _dense_files(folder: Path) -> list[Path]:
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
