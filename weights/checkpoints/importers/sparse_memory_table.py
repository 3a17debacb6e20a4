"""Reads the value table of a published sparse-memory-lm from its binary files."""

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.config import MemoryConfig
from memory_ops.row_formats import int4_row_records, row_bytes
from weights.checkpoints.hot_rows import check_row_ids
from weights.checkpoints.importers.model_settings import required
from weights.checkpoints.importers.sparse_memory_files import HOT_ROWS, META
from weights.checkpoints.table_files import RowLayout, converted_parts, requested_layout
from weights.checkpoints.table_origin import HASH_PATTERN
from weights.checkpoints.tensor_files import (
    PART_BYTES,
    STORED_DTYPES,
    StoredTensor,
    TensorSource,
    checksum_key,
    has_checksum,
    read_parts,
)
from weights.errors import CheckpointError
from weights.text_files import read_json_object, regular_file_bytes

_MOST_HEADER_BYTES = 2**12  # of a .npy file
CODES, SCALES, FLOATS = "values_q4.bin", "scales_q4.bin", "values_bf16.bin"


class PublishedFiles(NamedTuple):
    """The files of a published model: their folder, and what ``meta.json`` says of them.

    Attributes:
        shape: R and V of the table; may be anything until it is compared.
        checksums: SHA-256 by file name; may be anything until ``checksum`` returns it.
    """

    folder: Path
    shape: tuple[Any, Any]
    checksums: dict[str, Any]

    def checksum(self, name: str) -> str:
        """The SHA-256 that a file must have, in hexadecimal digits (CheckpointError)."""
        found = self.checksums.get(name)
        if not isinstance(found, str) or not re.fullmatch(HASH_PATTERN, found):
            raise CheckpointError(f"{self.folder / META}: sha256: has no valid entry for {name}")
        return found

    def verify(self, name: str, most: int | None = None) -> None:
        """Compare a whole file of at most ``most`` bytes with its checksum (CheckpointError)."""
        path, expected = self.folder / name, self.checksum(name)
        regular_file_bytes(path, most)
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        if found != expected:
            raise CheckpointError(f"{path}: does not match its SHA-256 in {META}; it is damaged")

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
        """A file as a tensor with a checksum, which is compared when the tensor is read.

        Raises:
            CheckpointError: the file cannot be read, has another length, or no checksum.
        """
        path = self.folder / name
        wanted = STORED_DTYPES[dtype].itemsize * torch.Size(shape).numel()
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        if size != wanted:
            raise CheckpointError(
                f"{path}: has {size} bytes, but {list(shape)} values take {wanted}"
            )
        metadata = {checksum_key(name): self.checksum(name)}
        return StoredTensor(name, path, dtype, shape, 0, size, metadata)


def read_meta(folder: Path) -> PublishedFiles:
    """Read ``meta.json`` (CheckpointError if it cannot be read, or a key is missing)."""
    path = folder / META
    raw = read_json_object(path)
    try:
        return PublishedFiles(
            folder, (raw.get("rows"), raw.get("dim")), required(raw, "sha256", dict)
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def published_table(
    files: PublishedFiles,
    name: str,
    memory: MemoryConfig,
    dtype: str | None,
    table_dtype: str | None,
) -> TensorSource:
    """The table ``name``: the codes exactly as int4_row, or the bf16 values.

    The codes are taken if there are any, unless ``table_dtype`` is another.

    Args:
        dtype: dtype of the bf16 values, unless ``table_dtype`` is given; None keeps it.
        table_dtype: one of ``TABLE_DTYPES``, which the table gets, or None.

    Raises:
        CheckpointError: a file is missing, or has a wrong length or no checksum, or the table's
            shape is not that of the model.
        ConfigError: ``table_dtype`` is unknown, or needs the bf16 values, which are missing.
    """
    wanted = memory.num_rows, memory.value_dim
    if files.shape != wanted:
        raise CheckpointError(
            f"{files.folder / META}: rows, dim: {files.shape!r:.100} is not {wanted}, as the model"
            " has it"
        )
    has_codes = (files.folder / CODES).exists()
    if has_codes and table_dtype in (None, "int4_row"):
        return _exact_source(files, name, memory)
    if (files.folder / FLOATS).exists():
        stored = files.tensor(FLOATS, "BF16", (memory.num_rows, memory.value_dim))
        return converted_table(stored, name, table_dtype or dtype)
    if has_codes:
        raise ConfigError(
            f"table_dtype: {files.folder} has int4_row rows only; {FLOATS} is missing"
        )
    raise CheckpointError(f"{files.folder}: has neither {CODES} nor {FLOATS}")


def published_hot_rows(files: PublishedFiles, num_rows: int) -> Tensor | None:
    """Ids of the rows that are read most, int64 ``[L]``, most read first; None without the file.

    Raises:
        CheckpointError: the file cannot be read, does not match its checksum, or is not a list of
            at most ``num_rows`` row ids in int64.
    """
    path = files.folder / HOT_ROWS
    if not path.exists():
        return None
    files.verify(HOT_ROWS, most=8 * num_rows + _MOST_HEADER_BYTES)
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.dtype != np.int64 or found.ndim != 1:
            raise ValueError("is not one list of int64 row ids")
    except Exception as error:  # a damaged header raises anything
        raise CheckpointError(f"{path}: {error!s:.200}") from None
    rows = torch.from_numpy(found)
    check_row_ids(str(path), rows, num_rows)
    return rows


def converted_table(stored: StoredTensor, name: str, dtype: str | None) -> TensorSource:
    """A table of floats as ``name`` in ``dtype``, one of ``TABLE_DTYPES``; None keeps its dtype.

    Raises:
        ConfigError: the dtype is unknown.
    """
    layout = requested_layout(stored, dtype)
    load = partial(converted_parts, stored, layout, verify=has_checksum(stored))
    return TensorSource(name, layout.shape, layout.dtype, load, layout.metadata)


def _exact_source(files: PublishedFiles, name: str, memory: MemoryConfig) -> TensorSource:
    num_rows, value_dim = memory.num_rows, memory.value_dim
    if value_dim % 2:
        raise CheckpointError(f"{files.folder / CODES}: rows of {value_dim} values are not even")
    codes = files.tensor(CODES, "U8", (num_rows, value_dim // 2))
    scales = files.tensor(SCALES, "F16", (num_rows,))
    shape = num_rows, row_bytes("int4_row", value_dim)
    layout = RowLayout("int4_row", shape, torch.uint8, ("int4_row", value_dim))
    load = partial(_exact_records, codes, scales)
    return TensorSource(name, layout.shape, layout.dtype, load, layout.metadata)


def _exact_records(codes: StoredTensor, scales: StoredTensor) -> Iterator[Tensor]:
    scale_R = torch.empty(scales.shape, dtype=torch.float16)
    for _ in read_parts(scales, scale_R, verify=True):
        pass
    if not scale_R.isfinite().all():
        raise CheckpointError(f"{scales.file}: has a scale that is not finite")
    first, row_size = 0, row_bytes("int4_row", 2 * codes.shape[1])
    for read in read_parts(codes, verify=True):
        # records may be much larger than their codes
        for part in torch.split(read, max(1, PART_BYTES // row_size)):
            # low halves of the bytes are the first half of a row
            codes_RV = torch.cat((part & 15, part >> 4), dim=1)
            yield int4_row_records(codes_RV, scale_R[first : first + len(part)]).records_RB
            first += len(part)
