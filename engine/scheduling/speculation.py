"""Speculation: draft tokens for decoding sequences, if they are worth verifying."""

import logging
from collections.abc import Callable, Iterable
from itertools import takewhile

from engine.request import TokenOutput
from engine.sampling.masks import allowed_drafts
from engine.scheduling.ngram_drafter import NgramDrafter
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import Drafter, SequenceChunk

# by the setting ``speculate``
DRAFTERS: dict[str, Callable[[], Drafter] | None] = {"none": None, "ngram": NgramDrafter}
logger = logging.getLogger(__name__)


class Speculation:
    """Asks the drafters of sequences, and counts their drafts.

    A step of R rows takes time in proportion to ``balance_rows + R``. An accepted draft saves its
    sequence a step; its row delays all B sequences that get a token from this step. So a draft is
    worth verifying if it is accepted with a probability of at least ``B / (balance_rows + R)``.

    Attributes:
        drafts, draft_tokens, accepted_tokens: see ``EngineStatistics``.
    """

    def __init__(
        self,
        make_drafter: Callable[[], Drafter],
        num_drafts: int,
        balance_rows: int,
        vocab_size: int,
    ) -> None:
        """Verify up to ``num_drafts`` tokens per sequence and step; see ``Executor``."""
        self.drafts = self.draft_tokens = self.accepted_tokens = 0
        self._make_drafter = make_drafter
        self._num_drafts = num_drafts
        self._balance_rows = balance_rows
        self._vocab_size = vocab_size
        self._worth = 0.0

    def weigh(self, chunks: Iterable[SequenceChunk]) -> None:
        """Set what is worth verifying in a step that runs at least these chunks."""
        rows = sequences = 0
        for chunk in chunks:
            rows += len(chunk.token_ids)
            sequences += chunk.samples
        self._worth = sequences / (self._balance_rows + rows)

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """Up to ``most`` drafts, of which the sequence's mask allows each after those before."""
        most = min(most, self._num_drafts)
        if most < 1:
            return []
        try:
            if sequence.drafter is None:
                sequence.drafter = self._make_drafter()
            drafted = sequence.drafter.draft(sequence.token_ids, most, self._worth)
            drafts = [*takewhile(lambda draft: 0 <= draft < self._vocab_size, drafted)][:most]
            if sequence.mask is not None and drafts:
                drafts = allowed_drafts(sequence.mask, drafts, self._vocab_size)
        except Exception:
            logger.exception("drafting for %s failed; no drafts are used", sequence.request_id)
            return []
        return drafts

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether drafts are likely after the pending token, if there is one.

        They are if there are drafts after the tokens before it. A step without drafts need not
        wait for the pending token, so sequences of which nothing repeats run as without drafts.
        """
        return bool(sequence.num_pending and self.propose(sequence, self._num_drafts))

    def count(self, outputs: Iterable[TokenOutput]) -> None:
        """Add the drafts of a step to the totals."""
        for output in outputs:
            self.drafts += output.draft_tokens > 0
            self.draft_tokens += output.draft_tokens
            self.accepted_tokens += output.accepted_tokens
