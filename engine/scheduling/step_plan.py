"""The plan of one step and its results, as plain data."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from engine.model.row_patches import PatchSet
from engine.request import MemoryRead
from engine.sampling.params import SamplingParams, TokenLogprobs

# in a plan: a token that an earlier step in flight chooses; only the device knows it yet
PENDING = -1


class Drafter(Protocol):
    """Proposes draft tokens of one sequence, which one step verifies.

    Wrong ones cost time, never correctness.
    """

    def draft(self, token_ids: Sequence[int], count: int, worth: float) -> Sequence[int]:
        """Up to ``count`` tokens that may follow these, all tokens of the sequence so far.

        A draft that is accepted with a probability below ``worth`` costs more than it gains.
        """


class SequenceChunk(NamedTuple):
    """The tokens of one sequence that a step runs.

    Attributes:
        turn: the sequence's place in the order of service, which identifies it.
        seat: the sequence's number among the running ones, in [0, ``max_num_seqs``).
        token_ids: the ids to run, at positions ``[start, end)``; the last ``num_drafts`` are
            drafts. The last may be ``PENDING``: the token that the sequence's seat got last.
        start: tokens of the sequence whose keys and values are in its blocks already.
        block_ids: the sequence's KV blocks in order, enough for its context after this chunk.
        seed: seed of the sequence's random numbers; each also depends on its position.
        samples: whether to choose a token after the last token that is no draft, and after each
            draft.
        scores: prompt tokens to score: those that follow the chunk's first, second, ... token.
        history: all tokens so far without drafts, if ``sampling.needs_history``; not a copy.
        prompt_length: number of the sequence's prompt tokens.
        patches: the row patches of the sequence's memory layers.
    """

    request_id: str
    turn: tuple[int, int]
    seat: int
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
    patches: PatchSet = ()

    @property
    def end(self) -> int:
        """The sequence's context length after this chunk, drafts included."""
        return self.start + len(self.token_ids)

    @property
    def is_scored(self) -> bool:
        """Whether it ends the prompt of a request that only scores its prompt."""
        return not self.sampling.max_tokens and self.end == self.prompt_length

    @property
    def drafts(self) -> tuple[int, ...]:
        """The draft tokens at the chunk's end."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def num_sampled(self) -> int:
        """Number of positions at which a token is chosen: the chunk's last ones."""
        return 1 + self.num_drafts if self.samples else 0


class StepPlan(NamedTuple):
    """The chunks of one step; they share one ragged forward in this order."""

    chunks: tuple[SequenceChunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


class ChunkResult(NamedTuple):
    """The tokens chosen at a chunk's sampled positions, and the requested log-probabilities.

    Attributes:
        token_ids: one per sampled position; the i-th is valid if all drafts before it are.
        logprobs: one entry per token, or none.
        prompt_logprobs: one entry for each of the chunk's ``scores``.
        memory_reads: for each token one read per memory layer, or none.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    memory_reads: tuple[tuple[MemoryRead, ...], ...] = ()
