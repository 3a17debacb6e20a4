"""Logits to token ids: greedy, or sampled by the inverse of the cumulative distribution.

A token costs one uniform number, a function of (seed, position) alone, so what a request draws does
not depend on its company.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import SamplingParams


def sample(
    logits_LV: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """Choose one token a row.

    Args:
        logits_LV: ``[L, vocabulary]``, any floating dtype.
        params: for each row how to choose.
        seeds: for each row its request's seed.
        positions: for each row the position that the chosen token will have.
    """
    chosen_L = logits_LV.argmax(dim=-1)
    drawn = [row for row, param in enumerate(params) if param.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits_LV.device)
        uniforms = uniform([seeds[row] for row in drawn], [positions[row] for row in drawn])
        chosen_L[rows] = _draw(
            logits_LV[rows].float(),
            [params[row] for row in drawn],
            torch.from_numpy(uniforms).to(logits_LV.device),
        )
    ids: list[int] = chosen_L.tolist()
    return ids


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


def _draw(logits_LV: Tensor, params: Sequence[SamplingParams], uniforms_L: Tensor) -> Tensor:
    device, vocab_size = logits_LV.device, logits_LV.shape[1]
    # at the least that fp32 can divide by, only the likeliest token is left anyway
    temperatures = torch.tensor([max(p.temperature, 1e-30) for p in params], device=device)
    # divided by the largest first: a tiny temperature must not overflow
    logits_LV = logits_LV - logits_LV.amax(dim=-1, keepdim=True)
    probabilities_LV = (logits_LV / temperatures.unsqueeze(1)).softmax(dim=-1)
    sorted_LV, ids_LV = probabilities_LV.double().sort(dim=-1, descending=True, stable=True)
    counts = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    top_k = torch.tensor(counts, device=device)
    top_p = torch.tensor([param.top_p for param in params], dtype=torch.float64, device=device)
    ranks_V = torch.arange(vocab_size, device=device)
    sorted_LV = sorted_LV.masked_fill(ranks_V >= top_k.unsqueeze(1), 0.0)
    # top_p is a share of what top_k left; a token stays while those before it fall short of it
    sorted_LV = sorted_LV / sorted_LV.sum(dim=-1, keepdim=True)
    before_LV = sorted_LV.cumsum(dim=-1) - sorted_LV
    sorted_LV = sorted_LV.masked_fill((before_LV >= top_p.unsqueeze(1)) & (ranks_V > 0), 0.0)
    cumulative_LV = sorted_LV.cumsum(dim=-1)
    targets_L1 = (uniforms_L * cumulative_LV[:, -1]).unsqueeze(1)
    drawn_L1 = torch.searchsorted(cumulative_LV, targets_L1, right=True)
    # rounding may put a target on the very end: the last token with any probability takes it
    last_L1 = ((sorted_LV > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return ids_LV.gather(1, drawn_L1.minimum(last_L1)).squeeze(1)
