"""Log-probabilities of a step in flight: computed on the device, converted when they are there."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.executors.batch import Batch
from engine.executors.cuda.device import Device
from engine.executors.cuda.step import StepOutputs
from engine.sampling.choice import NO_TOKEN
from engine.sampling.log_probabilities import Scores, score_tokens
from engine.sampling.params import TokenLogprobs
from engine.sampling.sampler import SCORED_AT_ONCE, token_logprobs


@dataclass
class ScoredTokens:
    """The positions of a batch whose tokens are scored, and their scores in pinned memory.

    Attributes:
        places: rows of logits.
        token_ids: the tokens to score; ``NO_TOKEN`` for the one that the step chooses there.
        counts: number of likeliest tokens to return with each.
    """

    places: list[int]
    token_ids: list[int]
    counts: list[int]
    _parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, batch: Batch) -> "ScoredTokens":
        """The positions that a batch asks to score."""
        rows = [
            (at, NO_TOKEN, row.params.logprobs)
            for at, row in enumerate(batch.rows)
            if row.params.logprobs is not None
        ]
        scored = enumerate(batch.scored, len(batch.rows))
        rows += [(at, one.token_id, one.num_best) for at, one in scored if one is not None]
        return cls([at for at, *_ in rows], [i for _, i, _ in rows], [n for *_, n in rows])

    def compute(self, outputs: StepOutputs, device: Device) -> None:
        """Queue the kernels and the copies to the host; call it where the step's work is queued."""
        vocab_size = outputs.logits_LV.shape[1]
        # pinned before it is sent: a copy from other memory would wait for the device
        wanted_2P = device.pinned((2, len(self.places)), torch.int64)
        wanted_2P.copy_(torch.tensor([self.places, self.token_ids]))
        rows_P, given_P = wanted_2P.to(device.torch_device, non_blocking=True)
        chosen_P = outputs.chosen_L.index_select(0, rows_P)
        # a row without a choice is scored too, and left out when that is known
        ids_P = torch.where(given_P == NO_TOKEN, chosen_P, given_P).clamp(min=0)
        for start in range(0, len(self.places), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            num_best = min(max(self.counts[part]), vocab_size)
            scores = score_tokens(outputs.logits_LV, rows_P[part], ids_P[part], num_best)
            columns = (ids_P[part], *scores)
            pinned = tuple(device.pinned(tuple(c.shape), c.dtype) for c in columns)
            for target, source in zip(pinned, columns, strict=True):
                target.copy_(source, non_blocking=True)
            self._parts.append(pinned)

    def results(self) -> Iterator[tuple[int, TokenLogprobs]]:
        """Place and log-probabilities of each token, once the copies are done."""
        for number, (ids, *columns) in enumerate(self._parts):
            part = slice(number * SCORED_AT_ONCE, (number + 1) * SCORED_AT_ONCE)
            entries = token_logprobs(Scores(*columns), ids.tolist(), self.counts[part])
            yield from zip(self.places[part], entries, strict=True)
