"""Token sampling: logits to ids and log-probabilities, by per-row parameters.

Each token uses one uniform number, a function of (seed, position) alone, and cumulative weights in
the order of the vocabulary: so a request gets the same tokens in any batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.choice import CHOICE, NO_TOKEN, Choices, choose
from engine.sampling.log_probabilities import Scores, score
from engine.sampling.logit_rules import apply_rules, masked
from engine.sampling.masks import Bitmask
from engine.sampling.params import TokenLogprobs
from engine.sampling.request_rules import SamplingRow

# rows of logits converted to fp32 at a time: all rows of a long prompt would take gigabytes
SCORED_AT_ONCE = 64


@dataclass(frozen=True)
class Sampler:
    """Samples with the kernels of one device; by default in plain torch on any device."""

    choose: Callable[[Tensor, Choices], Tensor] = choose
    score: Callable[[Tensor, Sequence[int], Sequence[int], int], Scores] = score
    mask: Callable[[Tensor, Bitmask], Tensor] = masked

    def sample(
        self, logits_LV: Tensor, rows: Sequence[SamplingRow], bitmask: Bitmask | None = None
    ) -> list[int]:
        """Choose one token per row, or ``NO_TOKEN`` if the rules leave none.

        ``logits_LV`` has any floating dtype and is not changed; ``bitmask`` is uint32
        ``[L, ceil(vocabulary / 32)]`` with a bit per allowed token.
        """
        if any(row.rules is not None for row in rows):
            logits_LV = logits_LV.to(torch.float32, copy=True)
            apply_rules(logits_LV, rows, bitmask)
        elif bitmask is not None:
            logits_LV = self.mask(logits_LV, bitmask)
        ids: list[int] = self.choose(logits_LV, choices_of(rows, logits_LV.shape[1])).tolist()
        return [token_id if token_id >= 0 else NO_TOKEN for token_id in ids]

    def log_probabilities(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        token_ids: Sequence[int],
        counts: Sequence[int],
    ) -> Iterator[TokenLogprobs]:
        """Log-probabilities by the softmax of rows of unchanged logits ``[L, vocabulary]``.

        For each of ``rows``, ``token_ids`` gives the token to score, and ``counts`` the number of
        likeliest tokens to return with it.
        """
        for start in range(0, len(rows), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            num_best = min(max(counts[part]), logits_LV.shape[1])
            scores = self.score(logits_LV, rows[part], token_ids[part], num_best)
            yield from token_logprobs(scores, token_ids[part], counts[part])


def token_logprobs(
    scores: Scores, token_ids: Sequence[int], counts: Sequence[int]
) -> Iterator[TokenLogprobs]:
    """The entries of scored tokens, each with its number of likeliest tokens."""
    columns = (column.tolist() for column in scores)
    for token_id, count, own, rank, best_ids, best in zip(token_ids, counts, *columns, strict=True):
        likeliest = zip(best_ids[:count], best[:count], strict=True)
        yield TokenLogprobs(token_id, own, rank, tuple(likeliest))


def choices_of(rows: Sequence[SamplingRow], vocab_size: int) -> Choices:
    """The rows' sampling parameters and random numbers, as kernels read them."""
    fields = [
        (params.temperature, min(params.top_k, vocab_size), params.top_p, params.min_p, 0)
        for params in (row.params for row in rows)
    ]
    choices = np.array(fields, dtype=CHOICE)
    if choices["temperature"].any():
        choices["uniform"] = uniform([row.seed for row in rows], [row.position for row in rows])
    return choices


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, position): two rounds of the SplitMix64 mixer."""
    seed = np.array([value % 2**64 for value in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    mixed = _splitmix64(_splitmix64(seed) ^ position)
    result: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
