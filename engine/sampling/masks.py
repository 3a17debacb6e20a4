"""Token masks: the protocol by which a grammar restricts a request's tokens, and its bitmasks."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bitmask = NDArray[np.uint32]


class TokenMask(Protocol):
    """A state that follows one request's tokens."""

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        """Set bit ``i % 32`` of word ``i // 32`` for every token id ``i`` that may come next.

        ``bitmask`` is zeroed, ``[ceil(vocabulary / 32)]``. If no bit is set, the request ends with
        an error.
        """

    def accept(self, token_ids: Sequence[int]) -> None:
        """Advance by these tokens, each of which was allowed after those before it."""

    def rollback(self, count: int) -> None:
        """Undo the last ``count`` accepted tokens."""


def row_bitmasks(mask: TokenMask, drafts: Sequence[int], vocab_size: int) -> Bitmask:
    """One row for the next token and one after each draft: ``[1 + drafts, words]``.

    The drafts must be ``allowed_drafts``. The mask is unchanged afterwards.
    """
    bitmask = np.zeros((1 + len(drafts), _words(vocab_size)), dtype=np.uint32)
    for index, row in enumerate(bitmask):
        mask.fill(row)
        mask.accept(drafts[index : index + 1])
    mask.rollback(len(drafts))
    return bitmask


def step_bitmask(parts: Iterable[tuple[int, Bitmask | None]], vocab_size: int) -> Bitmask | None:
    """The rows of a step from (number of rows, their bitmask or None for all ones) in order.

    Returns None if no part has a bitmask.
    """
    parts = list(parts)
    if all(bitmask is None for _, bitmask in parts):
        return None
    ones = np.full((1, _words(vocab_size)), 2**32 - 1, dtype=np.uint32)
    rows = [ones.repeat(count, 0) if bitmask is None else bitmask for count, bitmask in parts]
    return np.concatenate(rows)


def allowed_drafts(mask: TokenMask, drafts: Sequence[int], vocab_size: int) -> list[int]:
    """The longest prefix of ``drafts`` that the mask allows and after which it allows a token."""
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
