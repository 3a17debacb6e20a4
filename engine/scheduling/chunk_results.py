"""Applies a chunk's results to its sequence, and makes the request's output."""

import logging
import math

from engine.request import TokenOutput
from engine.sampling.params import TokenLogprobs
from engine.scheduling.sequence import Ending, Sequence
from engine.scheduling.step_plan import ChunkResult, SequenceChunk

logger = logging.getLogger(__name__)


def take_result(
    sequence: Sequence, chunk: SequenceChunk, result: ChunkResult, eos_ids: frozenset[int]
) -> Ending:
    """Record that a chunk in flight has run: add its tokens, up to one that ends the sequence."""
    sequence.num_in_flight -= 1
    sequence.num_pending -= chunk.samples
    sequence.has_drafts_in_flight &= not chunk.num_drafts
    accepted = _accepted(chunk, result.token_ids)
    sequence.num_computed += accepted
    if not all(map(_is_finite, (*result.prompt_logprobs, *result.logprobs))):
        sequence.prompt_scores = []
        message = "the model's log-probabilities are not finite (NaN or infinity)"
        return Ending(0, "error", error=message)
    sequence.prompt_scores += result.prompt_logprobs
    ending = sequence.append(result.token_ids[: accepted + 1], eos_ids)
    if ending.num_taken and ending.reason is not None:
        # neither drafts nor a step in flight count after the end
        sequence.num_computed = min(sequence.num_computed, len(sequence.token_ids) - 1)
    if chunk.is_scored:
        return Ending(0, "length")
    return _accept(sequence, result.token_ids[: ending.num_taken], ending)


def output(
    sequence: Sequence, chunk: SequenceChunk, result: ChunkResult, ending: Ending
) -> TokenOutput:
    """The output of a request whose chunk had this result."""
    return TokenOutput(
        request_id=sequence.request_id,
        token_ids=result.token_ids[: ending.num_taken],
        finish_reason=ending.reason,
        stop_token_id=ending.stop_token_id,
        error=ending.error,
        error_param=ending.error_param,
        logprobs=result.logprobs[: ending.num_taken],
        prompt_logprobs=tuple(sequence.prompt_scores),
        memory_reads=result.memory_reads[: ending.num_taken],
        cached_tokens=sequence.num_cached or 0,
        draft_tokens=chunk.num_drafts,
        accepted_tokens=min(_accepted(chunk, result.token_ids), ending.num_taken),
        queued_s=sequence.queued_s,
    )


def _is_finite(entry: TokenLogprobs) -> bool:
    # they are subtracted from one number, so the least likely of the likeliest stands for all
    return math.isfinite(entry.logprob) and (not entry.top or math.isfinite(entry.top[-1][1]))


def _accepted(chunk: SequenceChunk, chosen: tuple[int, ...]) -> int:
    """The number of drafts before the first that differs from the chosen token."""
    if not chunk.num_drafts:
        return 0
    pairs = zip(chunk.drafts, chosen, strict=False)
    return next((i for i, (draft, token) in enumerate(pairs) if draft != token), chunk.num_drafts)


def _accept(sequence: Sequence, token_ids: tuple[int, ...], ending: Ending) -> Ending:
    """Pass the tokens to the sequence's mask, which may end it; a failure ends only this one."""
    mask, grammar = sequence.mask, sequence.request.grammar
    if mask is None:
        return ending
    try:
        mask.accept(token_ids)
        is_barren = ending.reason == "error"
        if ending.reason != "stop" and (mask.is_complete or (is_barren and mask.may_end)):
            return Ending(ending.num_taken, "stop")
        failure = mask.failure if ending.reason != "stop" else None
        if grammar is not None and (is_barren or failure is not None):
            message = failure or "with the request's other rules, it leaves no token"
            error = f"{grammar.param}: {message}"
            return Ending(ending.num_taken, "error", error=error, error_param=grammar.param)
    except Exception as error:
        logger.exception("the token mask of %s failed", sequence.request_id)
        return Ending(ending.num_taken, "error", error=f"{type(error).__name__} in the token mask")
    return ending
