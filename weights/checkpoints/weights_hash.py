"""The hash of a model's weights."""

import hashlib
from collections.abc import Iterable
from operator import attrgetter

from weights.checkpoints.tensor_files import StoredTensor, read_mapped, tensor_bytes


def weights_hash(weights: Iterable[StoredTensor]) -> str:
    """A hash of the names, dtypes, shapes and values of tensors, in any order.

    Reads one tensor at a time.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    digest = hashlib.sha256()
    for one in sorted(weights, key=attrgetter("name")):
        digest.update(f"{one.name} {one.dtype} {list(one.shape)}\n".encode())
        digest.update(tensor_bytes(read_mapped(one)))
    return digest.hexdigest()
