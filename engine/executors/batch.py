"""The batch that an executor runs in one step, and the step's results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from engine.model.layout import PagedKv, TokenLayout
from engine.progress import Progress
from engine.sampling.choice import NO_TOKEN
from engine.sampling.masks import Bitmask
from engine.sampling.params import SamplingParams, TokenLogprobs
from engine.sampling.request_rules import SamplingRow
from engine.sampling.sampler import Sampler


@dataclass(frozen=True)
class ScoredToken:
    """A token that is given, and whose log-probability is wanted.

    ``num_best`` of the likeliest tokens are wanted with it.
    """

    token_id: int
    num_best: int


@dataclass(frozen=True)
class Batch:
    """One ragged forward and what to do with its logits; tensors are on the CPU.

    Of the L positions in ``logits_at_L`` the first ``len(rows)`` choose a token each, by ``rows``;
    the others, one for each of ``scored``, score a token.

    Attributes:
        ids_T: int64 token ids of all sequences, one sequence after another.
        layout: their places in sequences and KV blocks.
        logits_at_L: int64 positions in the batch whose logits are wanted.
        rows: how to choose a token at each of the first positions.
        bitmask: uint32 ``[len(rows), words]``, the tokens that may come, where masks restrict any.
        scored: the tokens to score at the other positions; None where none is wanted.
    """

    ids_T: Tensor
    layout: TokenLayout
    logits_at_L: Tensor
    rows: Sequence[SamplingRow] = ()
    bitmask: Bitmask | None = None
    scored: Sequence[ScoredToken | None] = ()


@dataclass(frozen=True)
class StepResult:
    """The results of one batch.

    Attributes:
        token_ids: the token chosen at each of the batch's ``rows``, or ``NO_TOKEN``.
        logprobs: for each of ``logits_at_L`` its log-probabilities, or None where none is wanted.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None]


def sample_batch(
    logits_LV: Tensor, batch: Batch, sampler: Sampler, progress: Progress
) -> StepResult:
    """Choose and score the tokens of a batch from the logits ``[L, vocabulary]`` of its forward."""
    rows = batch.rows
    ids = sampler.sample(logits_LV[: len(rows)], rows, batch.bitmask) if rows else []
    progress.mark()
    chosen = (
        None
        if row.params.logprobs is None or token_id == NO_TOKEN
        else ScoredToken(token_id, row.params.logprobs)
        for row, token_id in zip(rows, ids, strict=True)
    )
    wanted = [(at, one) for at, one in enumerate(chain(chosen, batch.scored)) if one is not None]
    logprobs: list[TokenLogprobs | None] = [None] * len(logits_LV)
    for at, found in _scores(logits_LV, wanted, sampler):
        logprobs[at] = found
        progress.mark()
    return StepResult(ids, logprobs)


def warm_up_batch() -> Batch:
    """One token at position 0 of block 0, from which a token is chosen greedily.

    Run it before any request: what the first step alone takes, such as reading mapped weights, must
    not be mistaken for a hanging step.
    """
    first = torch.zeros(1, dtype=torch.int64)
    layout = TokenLayout(first, (0, 1), PagedKv(first, first.unsqueeze(0), (1,)))
    greedy = SamplingParams(max_tokens=1, temperature=0)
    return Batch(first, layout, first, (SamplingRow(greedy, seed=0, position=1),))


def _scores(
    logits_LV: Tensor, wanted: Sequence[tuple[int, ScoredToken]], sampler: Sampler
) -> Iterator[tuple[int, TokenLogprobs]]:
    places = [at for at, _ in wanted]
    ids, counts = [one.token_id for _, one in wanted], [one.num_best for _, one in wanted]
    return zip(places, sampler.log_probabilities(logits_LV, places, ids, counts), strict=True)
