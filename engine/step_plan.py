"""What one step is to run, as plain data, good until it is committed; every rank runs the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.sampling_params import SamplingParams


class SequenceChunk(NamedTuple):
    """The tokens of one sequence that a step runs.

    Attributes:
        request_id: whose they are.
        token_ids: the ids to run, at positions ``[start, end)``; the last ``num_drafts`` of them
            are guesses.
        start: tokens of the sequence whose keys and values are in its blocks already.
        block_ids: the sequence's KV blocks in order, enough for its context after this chunk.
        sampling: how to choose tokens; the sequence's own.
        seed: the sequence's own, from which with the position its random numbers follow.
        samples: whether a token is chosen after the last one that is no guess (and, where guesses
            hold, after each of them).
        num_drafts: guesses at the end of ``token_ids``.
        scores: prompt tokens right after the chunk's first, second, ... token whose
            log-probabilities are wanted.
        history: where ``sampling.needs_history``, all tokens so far, no guesses; the sequence's
            own, not a copy, for a long one would be copied at every step.
        prompt_length: how many of the sequence's tokens are its prompt.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    samples: bool
    num_drafts: int = 0
    scores: tuple[int, ...] = ()
    history: Sequence[int] = ()
    prompt_length: int = 0

    @property
    def end(self) -> int:
        """The sequence's context length after this chunk, guesses included."""
        return self.start + len(self.token_ids)

    @property
    def num_attended(self) -> int:
        """Pairs of a token of the chunk and one that it attends to, itself included."""
        count = len(self.token_ids)
        return count * self.start + count * (count + 1) // 2

    @property
    def drafts(self) -> tuple[int, ...]:
        """The guesses."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def num_sampled(self) -> int:
        """Positions at which a token is chosen: the last ones of the chunk."""
        return 1 + self.num_drafts if self.samples else 0


@dataclass(frozen=True)
class StepPlan:
    """The chunks of one step; they share one ragged forward in this order."""

    chunks: tuple[SequenceChunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_attended(self) -> int:
        """Pairs of tokens that attention compares in each layer."""
        return sum(chunk.num_attended for chunk in self.chunks)

    @property
    def num_logits(self) -> int:
        """Rows of logits that the step makes."""
        return sum(chunk.num_sampled + len(chunk.scores) for chunk in self.chunks)
