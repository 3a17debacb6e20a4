"""Token masks: the protocol by which a grammar restricts a request's tokens."""

import logging
import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from engine.sampling.grammar import Grammar

Bitmask = NDArray[np.uint32]
logger = logging.getLogger(__name__)


class TokenMask(Protocol):
    """A state that follows one request's tokens. One thread at a time uses it."""

    @property
    def is_complete(self) -> bool:
        """Whether the accepted tokens end the answer: no token may follow."""

    @property
    def may_end(self) -> bool:
        """Whether the answer may end after the accepted tokens."""

    @property
    def failure(self) -> str | None:
        """Why the mask can allow no further token; None if it has not failed.

        A mask may fail in any method, and stays failed.
        """

    def fill(self, bitmask: Bitmask) -> None:
        """Set bit ``i % 32`` of word ``i // 32`` for every token id ``i`` that may come next.

        ``bitmask`` is zeroed, ``[ceil(vocabulary / 32)]``. It stays zeroed if the mask fails.
        """

    def accept(self, token_ids: Sequence[int]) -> None:
        """Advance by these tokens, each of which was allowed after those before it."""

    def rollback(self, count: int) -> None:
        """Undo the last ``count`` accepted tokens."""


class Grammars:
    """Makes token masks of grammars and fills their bitmasks; this one knows no grammar."""

    @property
    def num_free(self) -> int:
        """Grammars that fit in memory besides those that have masks."""
        return sys.maxsize

    def copies_left(self, grammar: Grammar) -> int:
        """Masks that a grammar which has masks can make besides them, without more memory."""
        return 0

    def compile(self, grammar: Grammar) -> TokenMask:
        """A mask at the beginning of an answer. It may take a second; any thread may call it.

        Raises:
            RequestError: the grammar is wrong, or too complex.
        """
        raise RequestError(grammar.param, "this engine has no grammars")

    def fill(self, masks: Sequence[tuple[int, TokenMask]], bitmask_LW: Bitmask) -> None:
        """Fill the zeroed row of each (row, mask), of which there is at least one.

        A mask that fails leaves its row zeroed.
        """
        for row, mask in masks:
            try:
                mask.fill(bitmask_LW[row])
            except Exception:
                logger.exception("a token mask failed")
                bitmask_LW[row] = 0


def allowed_drafts(mask: TokenMask, drafts: Sequence[int], vocab_size: int) -> list[int]:
    """The longest prefix of ``drafts`` that the mask allows and after which it allows a token."""
    allowed: list[int] = []
    bitmask = np.zeros(num_words(vocab_size), dtype=np.uint32)
    num_accepted = 0
    mask.fill(bitmask)
    try:
        for draft in drafts:
            if not bitmask[draft // 32] >> (draft % 32) & 1:
                break
            mask.accept([draft])
            num_accepted += 1
            if mask.is_complete:
                break
            bitmask[:] = 0
            mask.fill(bitmask)
            if not bitmask.any():
                break
            allowed.append(draft)
    finally:
        mask.rollback(num_accepted)
    return allowed


def num_words(vocab_size: int) -> int:
    """Words of a bitmask with one bit per token id."""
    return -(-vocab_size // 32)
