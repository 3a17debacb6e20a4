"""A hash of tensors by their checksums, or by samples of their values; it reads little."""

import hashlib
from collections.abc import Iterable
from operator import attrgetter

from weights.checkpoints.tensor_files import StoredTensor, checksum_key
from weights.errors import CheckpointError

_SAMPLE_BYTES = 2**14
_SAMPLES = 8


def sampled_hash(tensors: Iterable[StoredTensor]) -> str:
    """A hash of names, dtypes, shapes and contents of tensors, in any order.

    The checksum in its file stands for a tensor's content. Without one, 8 samples of 16 KiB do, at
    equal distances: files of the same size that differ elsewhere have the same hash.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for one in sorted(tensors, key=attrgetter("name")):
        digest.update(f"{one.name} {one.dtype} {list(one.shape)}\n".encode())
        checksum = one.metadata.get(checksum_key(one.name))
        if checksum is not None:
            digest.update(checksum.encode())
            continue
        try:
            with open(one.file, "rb") as file:
                for offset in _offsets(one.num_bytes):
                    file.seek(one.offset + offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, one.num_bytes - offset)))
        except OSError as error:
            raise CheckpointError(f"{one.file}: tensor {one.name}: {error.strerror}") from None
    return digest.hexdigest()


def _offsets(num_bytes: int) -> list[int]:
    """Offsets of the samples. The first is at the start, and the last ends with the tensor."""
    if num_bytes <= _SAMPLES * _SAMPLE_BYTES:
        return list(range(0, num_bytes, _SAMPLE_BYTES))
    last = num_bytes - _SAMPLE_BYTES
    return [last * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
