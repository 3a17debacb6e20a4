"""Tied embeddings that a checkpoint stores as the head, or twice."""

from dataclasses import replace

import torch

from weights.checkpoints.tensor_files import DTYPES, StoredTensor, read_mapped
from weights.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_AT_ONCE = 4096


def drop_tied_head(stored: dict[str, StoredTensor]) -> None:
    """Leave only the embedding among the tensors of a model with tied embeddings.

    Some programs store only the head, or the head with another dtype.

    Raises:
        CheckpointError: the head has other values than the embedding, which may not be in groups.
    """
    head = stored.pop(HEAD, None)
    if head is None:
        return
    embedding = stored.get(EMBEDDING)
    if embedding is None:
        stored[EMBEDDING] = replace(head, name=EMBEDDING)
        return
    is_grouped = f"{EMBEDDING}_scales" in stored
    if embedding.dtype not in DTYPES and not is_grouped:
        return  # the caller reports the embedding itself
    if (
        is_grouped
        or head.dtype not in DTYPES
        or head.shape != embedding.shape
        or not _are_equal(head, embedding)
    ):
        raise CheckpointError(
            f"{head.file}: tensor {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true"
        )


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of one shape have the same values, in whatever dtypes."""
    left, right = read_mapped(one), read_mapped(other)
    parts = (slice(at, at + _ROWS_AT_ONCE) for at in range(0, len(left), _ROWS_AT_ONCE))
    return all(torch.equal(left[part].double(), right[part].double()) for part in parts)
