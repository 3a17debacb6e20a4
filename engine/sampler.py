"""Logits to token ids: greedy, or sampled by the inverse of the cumulative distribution.

A token costs one uniform number, a function of (seed, position) alone, and is found in the order of
the vocabulary, whatever was cut away: so what a request draws does not depend on its company.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.chunk_result import NO_TOKEN
from engine.logit_rules import apply_rules
from engine.request import TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sampling_rows import SamplingRow

_BLOCK = 256
_ARGMAX_BLOCK = 1024
# rows of logits in fp32 at a time: a long prompt's would be gigabytes
_SCORED_AT_ONCE = 64
# no weight of a softmax below this is ever drawn; dividing by a power of two changes no other bit
_TINY = 2.0**-100


def sample(
    logits_LV: Tensor,
    rows: Sequence[SamplingRow],
    bitmask: NDArray[np.uint32] | None = None,
) -> list[int]:
    """Choose one token a row, or ``NO_TOKEN`` where the rules leave none.

    Args:
        logits_LV: ``[L, vocabulary]``, any floating dtype; left as it is.
        rows: for each row how to choose.
        bitmask: uint32 ``[L, ceil(vocabulary / 32)]``, a bit for every token that may come.
    """
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    has_rules = bitmask is not None or any(row.rules is not None for row in rows)
    if has_rules:
        logits_LV = logits_LV.to(torch.float32, copy=True)
        apply_rules(logits_LV, rows, bitmask)
    chosen_L = _argmax(logits_LV)
    if has_rules:
        is_barren_L = ~logits_LV.gather(1, chosen_L.unsqueeze(1)).squeeze(1).isfinite()
    if drawn:
        uniforms = uniform([rows[i].seed for i in drawn], [rows[i].position for i in drawn])
        at = torch.tensor(drawn, device=logits_LV.device)
        chosen_L[at] = _draw(
            (logits_LV if len(drawn) == len(rows) else logits_LV[at]).float(),
            [rows[i].params for i in drawn],
            torch.from_numpy(uniforms).to(logits_LV.device),
        )
    if has_rules:
        chosen_L[is_barren_L] = NO_TOKEN
    ids: list[int] = chosen_L.tolist()
    return ids


def log_probabilities(
    logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int], counts: Sequence[int]
) -> Iterator[TokenLogprobs]:
    """Log-probabilities at some rows of the logits, by the softmax of these as they are.

    Args:
        logits_LV: ``[L, vocabulary]``, any floating dtype.
        rows: which rows.
        token_ids: for each of them the token whose own is wanted.
        counts: for each how many of the likeliest tokens are wanted too.
    """
    for start in range(0, len(rows), _SCORED_AT_ONCE):
        part = slice(start, start + _SCORED_AT_ONCE)
        yield from _score(logits_LV, rows[part], token_ids[part], counts[part])


def _score(
    logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int], counts: Sequence[int]
) -> Iterator[TokenLogprobs]:
    at_P, ids_P = torch.tensor([rows, token_ids], device=logits_LV.device)
    scores_PV = logits_LV.index_select(0, at_P).float()
    total_P1 = scores_PV.logsumexp(dim=-1, keepdim=True)
    own_P1 = scores_PV.gather(1, ids_P.unsqueeze(1))
    ranks: list[int] = ((scores_PV > own_P1).sum(dim=-1) + 1).tolist()
    own: list[float] = (own_P1 - total_P1).squeeze(1).tolist()
    top = scores_PV.topk(min(max(counts), scores_PV.shape[1]), dim=-1)
    top_ids: list[list[int]] = top.indices.tolist()
    top_values: list[list[float]] = (top.values - total_P1).tolist()
    for index, (token_id, count) in enumerate(zip(token_ids, counts, strict=True)):
        likeliest = zip(top_ids[index][:count], top_values[index][:count], strict=True)
        yield TokenLogprobs(token_id, own[index], ranks[index], tuple(likeliest))


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): two rounds of the SplitMix64 mixer."""
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


def _argmax(logits_LV: Tensor) -> Tensor:
    """The first of the largest, by blocks: a plain argmax is not vectorised on a CPU."""
    if logits_LV.dtype == torch.bfloat16:
        # as integers their bits are ten times as fast to compare, and ordered alike from 0 upwards
        bits_LV = logits_LV.view(torch.int16)
        best_LB = _block_maxima(bits_LV)
        if bool((best_LB.amax(dim=-1) >= 0).all()):
            return _first_of(bits_LV, best_LB)
    return _first_of(logits_LV, _block_maxima(logits_LV))


def _block_maxima(values_LV: Tensor) -> Tensor:
    vocab_size = values_LV.shape[1]
    whole = vocab_size // _ARGMAX_BLOCK * _ARGMAX_BLOCK
    blocks_LBC = torch.unflatten(values_LV[:, :whole], 1, (-1, _ARGMAX_BLOCK))
    best_LB = blocks_LBC.amax(dim=-1)
    if whole == vocab_size:
        return best_LB
    return torch.cat((best_LB, values_LV[:, whole:].amax(dim=-1, keepdim=True)), dim=1)


def _first_of(values_LV: Tensor, best_LB: Tensor) -> Tensor:
    """Where the first of each row's largest values stands, given the maxima of its blocks."""
    starts_L1 = best_LB.argmax(dim=-1, keepdim=True) * _ARGMAX_BLOCK
    columns_LC = starts_L1 + torch.arange(_ARGMAX_BLOCK, device=values_LV.device)
    candidates_LC = values_LV.gather(1, columns_LC.clamp_(max=values_LV.shape[1] - 1))
    return starts_L1.squeeze(1) + candidates_LC.argmax(dim=-1)


def _blocks(x_LV: Tensor, padding: float) -> Tensor:
    missing = -x_LV.shape[1] % _BLOCK
    if missing:
        x_LV = torch.nn.functional.pad(x_LV, (0, missing), value=padding)
    return x_LV.view(len(x_LV), -1, _BLOCK)


def _draw(logits_LV: Tensor, params: Sequence[SamplingParams], uniforms_L: Tensor) -> Tensor:
    # the largest is taken off first: a tiny temperature must not overflow
    logits_LV = logits_LV - logits_LV.amax(dim=-1, keepdim=True)
    temperatures_L1 = _column(params, "temperature", logits_LV).clamp(min=1e-30)
    weights_LV = (logits_LV / temperatures_L1).softmax(dim=-1)
    weights_LV = _keep_top_k(weights_LV, params)
    weights_LV = _keep_top_p(weights_LV, params)
    if any(param.min_p for param in params):
        floor_L1 = weights_LV.amax(dim=-1, keepdim=True) * _column(params, "min_p", weights_LV)
        weights_LV = _at_least(weights_LV, floor_L1.clamp(min=_TINY))
    blocks_LBC = _blocks(weights_LV, 0.0)
    block_L, rest_L = _invert(blocks_LBC.sum(dim=-1), uniforms_L, relative=True)
    rows_L = torch.arange(len(block_L), device=block_L.device)
    inside_L, _ = _invert(blocks_LBC[rows_L, block_L], rest_L, relative=False)
    return block_L * _BLOCK + inside_L


def _invert(weights_LC: Tensor, targets_L: Tensor, relative: bool) -> tuple[Tensor, Tensor]:
    """The columns where the sums of weights first exceed the targets, and what is left of these."""
    sums_LC = weights_LC.double().cumsum(dim=-1)
    if relative:
        targets_L = targets_L * sums_LC[:, -1]
    found_L1 = torch.searchsorted(sums_LC, targets_L.unsqueeze(1), right=True)
    # rounding may put a target on the very end: the last column with any weight takes it
    places_C = torch.arange(weights_LC.shape[1], device=weights_LC.device)
    last_L1 = (places_C * (weights_LC > 0)).amax(dim=-1, keepdim=True)
    found_L1 = found_L1.minimum(last_L1)
    before_L1 = sums_LC.gather(1, found_L1) - weights_LC.gather(1, found_L1)
    return found_L1.squeeze(1), targets_L - before_L1.squeeze(1)


def _keep_top_k(weights_LV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    vocab_size = weights_LV.shape[1]
    counts = [param.top_k if 0 < param.top_k < vocab_size else vocab_size for param in params]
    if min(counts) == vocab_size:
        return weights_LV
    largest = max(count for count in counts if count < vocab_size)
    largest_LK = weights_LV.topk(largest, dim=-1).values
    ranks_L1 = torch.tensor(counts, device=weights_LV.device).unsqueeze(1) - 1
    floor_L1 = largest_LK.gather(1, ranks_L1.clamp(max=largest - 1))
    # rows without a bound keep everything; those as likely as the last one stay with it
    floor_L1 = torch.where(ranks_L1 < largest, floor_L1, _TINY)
    return _at_least(weights_LV, floor_L1.clamp(min=_TINY))


def _keep_top_p(weights_LV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    if all(param.top_p == 1 for param in params):
        return weights_LV
    # a share of what top_k left
    total_L1 = weights_LV.sum(dim=-1, keepdim=True)
    wanted_L1 = _column(params, "top_p", weights_LV) * total_L1
    # the largest floor above which enough is left, found bit by bit: floats that are not negative
    # are ordered as their bits are, and sorting a vocabulary takes ten times as long
    high_L1 = weights_LV.amax(dim=-1, keepdim=True).view(torch.int32)
    low_L1 = torch.full_like(high_L1, _bits(_TINY))
    while bool((low_L1 < high_L1).any()):
        middle_L1 = low_L1 + (high_L1 - low_L1 + 1) // 2
        floor_L1 = middle_L1.view(torch.float32)
        left_L1 = _at_least(weights_LV, floor_L1).sum(dim=-1, keepdim=True)
        is_enough_L1 = left_L1 >= wanted_L1
        low_L1 = torch.where(is_enough_L1, middle_L1, low_L1)
        high_L1 = torch.where(is_enough_L1, high_L1, middle_L1 - 1)
    keeps_all_L1 = wanted_L1 >= total_L1
    return _at_least(weights_LV, low_L1.view(torch.float32).masked_fill(keeps_all_L1, _TINY))


def _at_least(weights_LV: Tensor, floor_L1: Tensor) -> Tensor:
    """The weights, 0 where they fall short of the floor by more than rounding.

    Dividing and a threshold are vectorised on a CPU; a masked fill takes twenty times as long.
    """
    shares_LV = torch.nn.functional.threshold(weights_LV / floor_L1, 1 - 1e-6, 0.0, inplace=True)
    return shares_LV.mul_(floor_L1)


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def _column(params: Sequence[SamplingParams], name: str, like: Tensor) -> Tensor:
    values = [getattr(param, name) for param in params]
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
