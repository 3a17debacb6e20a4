"""What one step is to run, as plain data: every rank of a parallel model runs the same plan."""

from dataclasses import dataclass

from engine.request import SamplingParams


@dataclass(frozen=True)
class SequenceChunk:
    """The tokens of one sequence that a step runs.

    Attributes:
        request_id: whose they are.
        token_ids: the ids to run, at positions ``[start, start + len(token_ids))``.
        start: tokens of the sequence whose keys and values are in its blocks already.
        block_ids: the sequence's KV blocks in order, enough for its context after this chunk.
        sampling: how to choose the token that follows the chunk; ``None`` inside a prompt.
        seed: the sequence's own, from which with the position its random numbers follow.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sampling: SamplingParams | None
    seed: int

    @property
    def end(self) -> int:
        """The sequence's context length after this chunk."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class StepPlan:
    """The chunks of one step; they share one ragged forward in this order."""

    chunks: tuple[SequenceChunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)
