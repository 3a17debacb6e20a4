"""Token choice in plain torch: rows of logits to ids, greedily or drawn."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Per-row sampling parameters in the layout of struct Choice of sampling.h: fields of SamplingParams
# (top_k 0 or less for none), and a uniform number in [0, 1).
CHOICE = np.dtype(
    [("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("min_p", "f8"), ("uniform", "f8")]
)
Choices = NDArray[np.void]
# the result if penalties, bans and masks together leave no token
NO_TOKEN = -1

_BLOCK = 256
_ARGMAX_BLOCK = 1024
# weights below this are never drawn; dividing by a power of two changes no bit of a mantissa
_TINY = 2.0**-100


def choose(logits_LV: Tensor, choices: Choices) -> Tensor:
    """Choose one token id per row, which depends on that row and its choice alone.

    At temperature 0 it is the first of the largest logits. Otherwise it is the first id, in the
    order of the vocabulary, at which the sum of the kept weights exceeds ``uniform`` times their
    total. It is ``NO_TOKEN`` if a row's largest logit is infinite, or any is NaN.

    ``logits_LV`` has any floating dtype and is not changed. Returns int64 ``[L]``.
    """
    chosen_L = _argmax(logits_LV)
    is_barren_L = ~logits_LV.gather(1, chosen_L.unsqueeze(1)).squeeze(1).isfinite()
    drawn = np.flatnonzero(choices["temperature"] > 0)
    if len(drawn):
        at = torch.from_numpy(drawn).to(logits_LV.device)
        part_LV = logits_LV if len(drawn) == len(choices) else logits_LV[at]
        chosen_L[at] = _draw(part_LV.float(), choices[drawn])
    return chosen_L.masked_fill_(is_barren_L, NO_TOKEN)


def _argmax(logits_LV: Tensor) -> Tensor:
    """The first of the largest, or of NaN, by blocks: a plain argmax is not vectorised on a CPU."""
    vocab_size = logits_LV.shape[1]
    whole = vocab_size // _ARGMAX_BLOCK * _ARGMAX_BLOCK
    best_LB = torch.unflatten(logits_LV[:, :whole], 1, (-1, _ARGMAX_BLOCK)).amax(dim=-1)
    if whole < vocab_size:
        best_LB = torch.cat((best_LB, logits_LV[:, whole:].amax(dim=-1, keepdim=True)), dim=1)
    starts_L1 = best_LB.argmax(dim=-1, keepdim=True) * _ARGMAX_BLOCK
    columns_LC = starts_L1 + torch.arange(_ARGMAX_BLOCK, device=logits_LV.device)
    candidates_LC = logits_LV.gather(1, columns_LC.clamp_(max=vocab_size - 1))
    return starts_L1.squeeze(1) + candidates_LC.argmax(dim=-1)


def _draw(logits_LV: Tensor, choices: Choices) -> Tensor:
    # subtract the largest logit first, so that a tiny temperature does not overflow
    logits_LV = logits_LV - logits_LV.amax(dim=-1, keepdim=True)
    temperatures_L1 = _column(choices, "temperature", logits_LV).clamp(min=1e-30)
    weights_LV = (logits_LV / temperatures_L1).softmax(dim=-1)
    weights_LV = _keep_top_p(_keep_top_k(weights_LV, choices), choices)
    if choices["min_p"].any():
        floor_L1 = weights_LV.amax(dim=-1, keepdim=True) * _column(choices, "min_p", weights_LV)
        weights_LV = _at_least(weights_LV, floor_L1.clamp(min=_TINY))
    uniforms_L = _column(choices, "uniform", weights_LV.double()).squeeze(1)
    if missing := -weights_LV.shape[1] % _BLOCK:
        weights_LV = torch.nn.functional.pad(weights_LV, (0, missing))
    blocks_LBC = weights_LV.view(len(weights_LV), -1, _BLOCK)
    block_L, rest_L = _invert(blocks_LBC.sum(dim=-1), uniforms_L, relative=True)
    rows_L = torch.arange(len(block_L), device=block_L.device)
    inside_L, _ = _invert(blocks_LBC[rows_L, block_L], rest_L, relative=False)
    return block_L * _BLOCK + inside_L


def _invert(weights_LC: Tensor, targets_L: Tensor, relative: bool) -> tuple[Tensor, Tensor]:
    """The columns at which cumulative weights first exceed the targets, and the targets' rest."""
    sums_LC = weights_LC.double().cumsum(dim=-1)
    if relative:
        targets_L = targets_L * sums_LC[:, -1]
    found_L1 = torch.searchsorted(sums_LC, targets_L.unsqueeze(1), right=True)
    # rounding may put a target at the end: then the last column with any weight is chosen
    places_C = torch.arange(weights_LC.shape[1], device=weights_LC.device)
    last_L1 = (places_C * (weights_LC > 0)).amax(dim=-1, keepdim=True)
    found_L1 = found_L1.minimum(last_L1)
    before_L1 = sums_LC.gather(1, found_L1) - weights_LC.gather(1, found_L1)
    return found_L1.squeeze(1), targets_L - before_L1.squeeze(1)


def _keep_top_k(weights_LV: Tensor, choices: Choices) -> Tensor:
    vocab_size = weights_LV.shape[1]
    counts = [k if 0 < k < vocab_size else vocab_size for k in choices["top_k"].tolist()]
    if min(counts) == vocab_size:
        return weights_LV
    largest = max(count for count in counts if count < vocab_size)
    largest_LK = weights_LV.topk(largest, dim=-1).values
    ranks_L1 = torch.tensor(counts, device=weights_LV.device).unsqueeze(1) - 1
    floor_L1 = largest_LK.gather(1, ranks_L1.clamp(max=largest - 1))
    # rows without top_k keep everything; tokens as likely as the k-th are kept with it
    floor_L1 = torch.where(ranks_L1 < largest, floor_L1, _TINY)
    return _at_least(weights_LV, floor_L1.clamp(min=_TINY))


def _keep_top_p(weights_LV: Tensor, choices: Choices) -> Tensor:
    if (choices["top_p"] == 1).all():
        return weights_LV
    # a fraction of the weights that top_k kept
    total_L1 = weights_LV.sum(dim=-1, keepdim=True)
    wanted_L1 = _column(choices, "top_p", weights_LV) * total_L1
    # binary search for the largest floor that keeps enough, over the bits of non-negative floats,
    # which are ordered as the floats; sorting a vocabulary takes ten times as long
    largest_L1 = weights_LV.amax(dim=-1, keepdim=True)
    high_L1 = largest_L1.view(torch.int32)
    low_L1 = torch.full_like(largest_L1, _TINY).view(torch.int32)
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
    """The weights, with those below the floor by more than rounding set to 0.

    A division and a threshold are vectorised on a CPU; a masked fill takes twenty times as long.
    """
    shares_LV = torch.nn.functional.threshold(weights_LV / floor_L1, 1 - 1e-6, 0.0, inplace=True)
    return shares_LV.mul_(floor_L1)


def _column(choices: Choices, name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(choices[name].copy()).to(like).unsqueeze(1)
