"""Writes safetensors files one tensor or part at a time, with optional checksums and origins."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from weights.checkpoints.new_folder import check_space, partial_path, sync_folder
from weights.checkpoints.table_origin import ORIGIN, new_origin
from weights.checkpoints.tensor_files import (
    PART_BYTES,
    STORED_DTYPES,
    TensorSource,
    checksum_key,
    tensor_bytes,
)

# table rows start on a page boundary, so that direct reads and mappings are aligned
_DATA_ALIGNMENT = 4096
_CODES = {dtype: code for code, dtype in STORED_DTYPES.items()}
_PLACEHOLDER_CHECKSUM = "0" * hashlib.sha256().digest_size * 2


def write_tensors(
    path: Path,
    sources: list[TensorSource],
    on_write: Callable[[int], Any],
    with_checksums: bool = False,
) -> None:
    """Write a safetensors file whose data start on a page boundary, and fsync it.

    Calls ``on_write`` with the bytes of each tensor or part after they are written.
    ``with_checksums`` adds the checksum of every tensor to the metadata, and the origin of a table
    that does not bring one.

    Raises:
        OSError: the file cannot be written, or is too short when it is read back, or the disk has
            less space than the tensors need.
    """
    check_space(path.parent, sum(map(_num_bytes, sources)))
    checksums = {source.name: hashlib.sha256() for source in sources if with_checksums}
    with open(path, "xb") as file:
        file.write(_header(sources, dict.fromkeys(checksums, _PLACEHOLDER_CHECKSUM)))
        for source in sources:
            num_bytes = 0
            for data in _written(path, file, source, with_checksums):
                if with_checksums:
                    checksums[source.name].update(data)
                on_write(data.nbytes)
                num_bytes += data.nbytes
            is_unread = source.store is not None and not with_checksums
            assert is_unread or num_bytes == _num_bytes(source), source.name
        if with_checksums:
            found = {name: checksum.hexdigest() for name, checksum in checksums.items()}
            file.seek(0)
            file.write(_header(sources, found))
        file.flush()
        os.fsync(file.fileno())


def _written(
    path: Path, file: BinaryIO, source: TensorSource, is_read: bool
) -> Iterator[memoryview]:
    """Write a tensor at the end of the file, and yield its bytes in parts.

    Those of a source that stores itself are read back, and only if ``is_read`` is set.
    """
    if source.store is None:
        loaded = source.load()
        for part in (loaded,) if isinstance(loaded, Tensor) else loaded:
            assert part.shape[1:] == torch.Size(source.shape[1:]), source.name
            data = tensor_bytes(part.to(source.dtype).contiguous())
            file.write(data)
            yield data
        return
    file.flush()
    offset, size = file.tell(), _num_bytes(source)
    file.truncate(offset + size)
    source.store(path, offset)
    if is_read:
        # opened now, so that a network file system shows what other machines wrote
        with open(path, "rb") as stored:
            stored.seek(offset)
            for first in range(0, size, PART_BYTES):
                content = stored.read(count := min(PART_BYTES, size - first))
                if len(content) < count:
                    problem = f"{path.name} is shorter than what was written to it"
                    raise OSError(errno.EIO, problem, str(path))
                yield memoryview(content)
    file.seek(offset + size)


def replace_tensors(path: Path, sources: list[TensorSource]) -> None:
    """Write a safetensors file, replacing an older one atomically (OSError)."""
    partial = partial_path(path)
    try:
        write_tensors(partial, sources, lambda num_bytes: None)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _header(sources: list[TensorSource], checksums: Mapping[str, str]) -> bytes:
    """The bytes before the data; their length does not depend on the checksums."""
    metadata = {"format": "pt"}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for source in sources:
        metadata |= source.metadata
        start, end = end, end + _num_bytes(source)
        header[source.name] = {
            "dtype": _CODES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
        if source.name in checksums:
            metadata[checksum_key(source.name)] = digits = checksums[source.name]
            metadata.setdefault(ORIGIN, new_origin(_CODES[source.dtype], source.shape, digits))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _num_bytes(source: TensorSource) -> int:
    return source.dtype.itemsize * torch.Size(source.shape).numel()
