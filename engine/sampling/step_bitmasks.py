"""Fills the bitmasks of a step in a background thread while the model runs."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from engine.sampling.masks import Bitmask, Grammars, TokenMask, num_words


class SampledRows(NamedTuple):
    """Consecutive rows of a step: those of one sequence, after each of its drafts and before them.

    Attributes:
        mask: the sequence's mask; None allows every token.
        drafts: ``allowed_drafts`` of the mask, one less than the rows.
    """

    num_rows: int
    mask: TokenMask | None
    drafts: Sequence[int] = ()


class StepBitmasks:
    """One thread that fills bitmasks, in the order of the steps.

    Between ``start`` and the end of the returned work no one else may use the masks.
    """

    def __init__(self, vocab_size: int, grammars: Grammars) -> None:
        self._num_words = num_words(vocab_size)
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bitmasks")

    def start(self, parts: Sequence[SampledRows]) -> "Future[Bitmask] | None":
        """Begin to fill the rows ``[L, words]`` of a step; None if no part has a mask.

        The row of a mask that fails has no bit. The masks are unchanged afterwards.
        """
        if all(part.mask is None for part in parts):
            return None
        return self._thread.submit(self._filled, parts)

    def _filled(self, parts: Sequence[SampledRows]) -> Bitmask:
        num_rows = sum(part.num_rows for part in parts)
        bitmask_LW = np.full((num_rows, self._num_words), 2**32 - 1, dtype=np.uint32)
        undrafted: list[tuple[int, TokenMask]] = []
        row = 0
        for num_rows, mask, drafts in parts:
            if mask is not None:
                bitmask_LW[row : row + num_rows] = 0
                if drafts:
                    self._fill_drafted(mask, drafts, bitmask_LW[row : row + num_rows])
                else:
                    undrafted.append((row, mask))
            row += num_rows
        if undrafted:
            self._grammars.fill(undrafted, bitmask_LW)
        return bitmask_LW

    def _fill_drafted(self, mask: TokenMask, drafts: Sequence[int], bitmask_LW: Bitmask) -> None:
        num_accepted = 0
        try:
            for row in range(len(bitmask_LW)):
                self._grammars.fill([(row, mask)], bitmask_LW)
                accepted = drafts[row : row + 1]
                mask.accept(accepted)
                num_accepted += len(accepted)
        finally:
            mask.rollback(num_accepted)
