"""The plan of one step and its results, as plain data; every rank runs the same plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.sampling.params import SamplingParams, TokenLogprobs


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


class ChunkResult(NamedTuple):
    """The tokens chosen at a chunk's sampled positions, and the log-probabilities asked for.

    Attributes:
        token_ids: one a sampled position; the i-th holds only if all guesses before it do.
        logprobs: one entry a token, or none.
        prompt_logprobs: one entry for each of the chunk's ``scores``.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
