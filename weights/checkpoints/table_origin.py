"""The origin of a value table: a hash of its first rows, carried along by conversions."""

import hashlib
import re
from collections.abc import Sequence

from weights.checkpoints.tensor_files import (
    StoredTensor,
    checksum_key,
    read_parts,
    tensor_bytes,
)
from weights.errors import CheckpointError

ORIGIN, PATCHES = "origin", "patches"
HASH_PATTERN = "[0-9a-f]{64}"


def new_origin(dtype: str, shape: Sequence[int], checksum: str) -> str:
    """The origin of rows that are not derived from another table.

    Args:
        dtype: safetensors code of the rows' dtype.
        shape: shape of the stored tensor.
        checksum: SHA-256 of the rows' bytes, in hexadecimal digits.

    Returns:
        The SHA-256 of all three, in hexadecimal digits.
    """
    return hashlib.sha256(f"{dtype} {list(shape)} {checksum}".encode()).hexdigest()


def table_origin(stored: StoredTensor) -> str:
    """The origin that a table's file names, or else that of its content.

    The checksum in the file stands for its content. A file without one is read once, in parts.

    Raises:
        CheckpointError: the origin is not a hash, or the file cannot be read.
    """
    origin = stored.metadata.get(ORIGIN)
    if origin is None:
        return new_origin(stored.dtype, stored.shape, _checksum(stored))
    _check_hash(stored, ORIGIN, origin)
    return origin


def carried_metadata(stored: StoredTensor) -> dict[str, str]:
    """Metadata that a copy of a table keeps, whatever its row format: origin and patches.

    Raises:
        CheckpointError: as ``table_origin``.
    """
    patches = stored.metadata.get(PATCHES)
    return {ORIGIN: table_origin(stored)} | ({} if patches is None else {PATCHES: patches})


def applied_patches(stored: StoredTensor) -> list[str]:
    """Content hashes of the row patches that were written into a table, in order.

    Raises:
        CheckpointError: one is not a hash.
    """
    hashes = stored.metadata.get(PATCHES, "").split()
    for one in hashes:
        _check_hash(stored, PATCHES, one)
    return hashes


def _check_hash(stored: StoredTensor, key: str, value: str) -> None:
    if not re.fullmatch(HASH_PATTERN, value):
        raise CheckpointError(
            f"{stored.file}: {key}: expected 64 hexadecimal digits, got {value[:80]!r}"
        )


def _checksum(stored: StoredTensor) -> str:
    found = stored.metadata.get(checksum_key(stored.name))
    if found is not None:
        return found
    checksum = hashlib.sha256()
    for part in read_parts(stored):
        checksum.update(tensor_bytes(part))
    return checksum.hexdigest()
