"""The batch that an executor runs in one step, and the step's results."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.model.layout import PagedKv, TokenLayout
from engine.progress import Progress
from engine.sampling.choice import NO_TOKEN
from engine.sampling.masks import Bitmask
from engine.sampling.params import SamplingParams, TokenLogprobs
from engine.sampling.request_rules import SamplingRow
from engine.sampling.sampler import Sampler

# seconds between two marks of progress while a bitmask is filled
_BITMASK_S = 0.5


class ScoredToken(NamedTuple):
    """A token to score, together with the ``num_best`` likeliest tokens."""

    token_id: int
    num_best: int


def pending_id(seat: int) -> int:
    """The id in a batch that stands for the token which ``seat`` got last, in a step in flight."""
    return -1 - seat


@dataclass(frozen=True)
class Batch:
    """One ragged forward and the use of its logits; tensors are on the CPU.

    Attributes:
        ids_T: int64 token ids of all sequences, one sequence after another. Only executors with
            ``steps_ahead`` get ids of pending tokens; see ``pending_id``.
        layout: positions of the tokens in sequences and KV blocks.
        logits_at_L: int64 positions in the batch to compute logits at.
        rows: sampling rows of the first ``len(rows)`` of these positions.
        bitmask: uint32 ``[len(rows), words]`` of allowed tokens, if masks restrict any. It is
            filled while the model runs, so wait for it after the forward.
        scored: the token to score at each of the other positions, or None.
        seats: each sequence's number, distinct among the sequences that run at the same time.
        block_ids: each sequence's KV blocks, those in the layout.
    """

    ids_T: Tensor
    layout: TokenLayout
    logits_at_L: Tensor
    rows: Sequence[SamplingRow] = ()
    bitmask: "Future[Bitmask] | None" = None
    scored: Sequence[ScoredToken | None] = ()
    seats: Sequence[int] = ()
    block_ids: Sequence[tuple[int, ...]] = ()


class StepResult(NamedTuple):
    """The results of one batch.

    Attributes:
        token_ids: the token chosen for each of the batch's ``rows``, or ``NO_TOKEN``.
        logprobs: the requested log-probabilities, by their place in ``logits_at_L``.
    """

    token_ids: Sequence[int]
    logprobs: Mapping[int, TokenLogprobs]


class LaunchedStep(Protocol):
    """A step in flight."""

    def wait(self) -> StepResult:
        """Wait for the step and return its results. Call it once, in the order of the launches.

        Raises:
            DeviceLostError: the device failed; no step can run any more.
        """
        ...


class FinishedStep(NamedTuple):
    """A step of an executor that computes in ``launch``."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class DeviceLostError(RuntimeError):
    """The device cannot compute any more; only a new process can use it again."""


def sample_batch(
    logits_LV: Tensor, batch: Batch, sampler: Sampler, progress: Progress
) -> StepResult:
    """Choose and score the tokens of a batch from the logits ``[L, vocabulary]`` of its forward."""
    rows, bitmask = batch.rows, filled_bitmask(batch, progress)
    ids = sampler.sample(logits_LV[: len(rows)], rows, bitmask) if rows else []
    progress.mark()
    wanted = [
        (at, ScoredToken(token_id, row.params.logprobs))
        for at, (row, token_id) in enumerate(zip(rows, ids, strict=True))
        if row.params.logprobs is not None and token_id != NO_TOKEN
    ]
    wanted += [(at, one) for at, one in enumerate(batch.scored, len(rows)) if one is not None]
    places = [at for at, _ in wanted]
    own_ids, counts = [one.token_id for _, one in wanted], [one.num_best for _, one in wanted]
    logprobs: dict[int, TokenLogprobs] = {}
    found = sampler.log_probabilities(logits_LV, places, own_ids, counts)
    for at, token_logprobs in zip(places, found, strict=True):
        logprobs[at] = token_logprobs
        progress.mark()
    return StepResult(ids, logprobs)


def filled_bitmask(batch: Batch, progress: Progress) -> Bitmask | None:
    """Wait for the batch's bitmask. Its work is bounded, so waiting counts as progress."""
    if batch.bitmask is None:
        return None
    while not wait((batch.bitmask,), _BITMASK_S).done:
        progress.mark()
    return batch.bitmask.result()


def warm_up_batch() -> Batch:
    """One token at position 0 of block 0, and a greedy choice.

    Run it before any request, so that a slow first step, which reads mapped weights for instance,
    is not mistaken for a hanging one.
    """
    first = torch.zeros(1, dtype=torch.int64)
    layout = TokenLayout(first, (0, 1), PagedKv(first, first.unsqueeze(0), (1,)))
    greedy = SamplingParams(max_tokens=1, temperature=0)
    rows = (SamplingRow(greedy, seed=0, position=1),)
    return Batch(first, layout, first, rows, seats=(0,), block_ids=((0,),))
