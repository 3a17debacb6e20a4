"""The batch that an executor runs in one step, and the step's results."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.executors.block_tables import BlockIds
from engine.model.layout import PagedKv, TokenLayout
from engine.model.row_patches import PatchSet, forward_patches
from engine.progress import Progress
from engine.request import MemoryRead
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
        positions_T, query_starts: see ``TokenLayout``.
        kv_index_T, context_lengths: see ``PagedKv``.
        block_ids: the KV blocks of each sequence's context in order; an executor keeps a table of
            them where its device reads it.
        seats: each sequence's number, distinct among the sequences that run at the same time.
        logits_at_L: int64 positions in the batch to compute logits at.
        rows: sampling rows of the first ``len(rows)`` of these positions.
        bitmask: uint32 ``[len(rows), words]`` of allowed tokens, if masks restrict any. It is
            filled while the model runs, so wait for it after the forward.
        scored: the token to score at each of the other positions, or None.
        patches: the row patches of each sequence, maybe none.
    """

    ids_T: Tensor
    positions_T: Tensor
    query_starts: tuple[int, ...]
    kv_index_T: Tensor
    context_lengths: tuple[int, ...]
    block_ids: Sequence[BlockIds]
    seats: Sequence[int]
    logits_at_L: Tensor
    rows: Sequence[SamplingRow] = ()
    bitmask: "Future[Bitmask] | None" = None
    scored: Sequence[ScoredToken | None] = ()
    patches: Sequence[PatchSet] = ()

    def layout(self, block_table_SB: Tensor) -> TokenLayout:
        """The layout that the model reads, with a table of ``block_ids``."""
        paged = PagedKv(self.kv_index_T, block_table_SB, self.context_lengths)
        patches = forward_patches(self.patches, self.query_starts) if any(self.patches) else None
        return TokenLayout(self.positions_T, self.query_starts, paged, patches)


class StepResult(NamedTuple):
    """The results of one batch.

    Attributes:
        token_ids: the token chosen for each of the batch's ``rows``, or ``NO_TOKEN``.
        logprobs: the requested log-probabilities, by their place in ``logits_at_L``.
        memory_reads: for each traced place in ``logits_at_L`` one read per memory layer.
    """

    token_ids: Sequence[int]
    logprobs: Mapping[int, TokenLogprobs]
    memory_reads: Mapping[int, tuple[MemoryRead, ...]]


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
    logits_LV: Tensor,
    batch: Batch,
    sampler: Sampler,
    progress: Progress,
    memory_reads: Mapping[int, tuple[MemoryRead, ...]],
) -> StepResult:
    """Choose and score the tokens of a batch from the logits ``[L, vocabulary]`` of its forward.

    ``memory_reads`` become part of the result.
    """
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
    return StepResult(ids, logprobs, memory_reads)


def prompt_batch(ids: Sequence[int], block_size: int) -> Batch:
    """A whole prompt in the first KV blocks, with logits at every position."""
    at_T, length = torch.arange(len(ids)), len(ids)
    return Batch(
        ids_T=torch.tensor(ids),
        positions_T=at_T,
        query_starts=(0, length),
        kv_index_T=at_T,
        context_lengths=(length,),
        block_ids=(tuple(range(-(-length // block_size))),),
        seats=(0,),
        logits_at_L=at_T,
    )


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
    greedy = SamplingParams(max_tokens=1, temperature=0)
    rows = (SamplingRow(greedy, seed=0, position=1),)
    return replace(prompt_batch((0,), block_size=1), rows=rows)
