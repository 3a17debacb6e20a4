"""Token masks at work: bitmasks for a plan, and guesses that a mask would not allow cut off."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.step_plan import SequenceChunk
from engine.token_mask import TokenMask


def chunk_bitmask(chunk: SequenceChunk, mask: TokenMask, vocab_size: int) -> NDArray[np.uint32]:
    """``[sampled positions, words]``; the chunk's guesses must be ``allowed_drafts``.

    The mask is left as it was.
    """
    bitmask = np.zeros((chunk.num_sampled, _words(vocab_size)), dtype=np.uint32)
    for index, row in enumerate(bitmask):
        mask.fill(row)
        mask.accept(chunk.drafts[index : index + 1])
    mask.rollback(chunk.num_drafts)
    return bitmask


def plan_bitmask(
    chunks: Sequence[SequenceChunk], bound: Mapping[str, NDArray[np.uint32]], vocab_size: int
) -> NDArray[np.uint32] | None:
    """A row a sampled position of a plan: those in ``bound``, all ones for other requests.

    ``None`` where no request is bound.
    """
    if not bound:
        return None

    def rows(chunk: SequenceChunk) -> NDArray[np.uint32]:
        free = np.full((chunk.num_sampled, _words(vocab_size)), 2**32 - 1, dtype=np.uint32)
        return bound.get(chunk.request_id, free)

    return np.concatenate([rows(chunk) for chunk in chunks])


def allowed_drafts(mask: TokenMask, drafts: Sequence[int], vocab_size: int) -> list[int]:
    """The beginning of ``drafts`` that the mask allows, and after which it allows anything."""
    allowed: list[int] = []
    bitmask = np.zeros(_words(vocab_size), dtype=np.uint32)
    num_accepted = 0
    mask.fill(bitmask)
    try:
        for draft in drafts:
            if not bitmask[draft // 32] >> (draft % 32) & 1:
                break
            mask.accept([draft])
            num_accepted += 1
            bitmask[:] = 0
            mask.fill(bitmask)
            if not bitmask.any():
                break
            allowed.append(draft)
    finally:
        mask.rollback(num_accepted)
    return allowed


def _words(vocab_size: int) -> int:
    return -(-vocab_size // 32)
