"""What running one chunk of a plan gave."""

from typing import NamedTuple

from engine.request import TokenLogprobs

# chosen where penalties, bans and masks together leave no token
NO_TOKEN = -1


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
