"""Greedy answers of the plain forward loop, for many prompts at once."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from engine.model.layout import TokenLayout
from engine.model.transformer import Transformer

# logits differ in their last bits with the batch: a choice by less could be another one
_LEAST_MARGIN = 1e-3


class PlainAnswer(NamedTuple):
    """The tokens of one answer, and the log-probability of each among all tokens."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@torch.inference_mode()
def plain_answers(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    allowed: Sequence[int] | None = None,
) -> list[PlainAnswer]:
    """``count`` greedy tokens per prompt; each token takes a forward pass over all ids so far.

    ``allowed`` are the only tokens of the answers. An answer ends early before a token that is
    nearly tied with another one.
    """
    sequences = [list(prompt) for prompt in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    num_clear = [count] * len(prompts)
    for step in range(count):
        starts = (0, *accumulate(map(len, sequences)))
        positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
        ids = torch.tensor([token_id for ids in sequences for token_id in ids])
        layout = TokenLayout(positions, starts)
        scores_SV = model(ids, layout, torch.tensor(starts[1:]) - 1).logits_LV.log_softmax(-1)
        choices = range(scores_SV.shape[1]) if allowed is None else allowed
        top = scores_SV[:, list(choices)].topk(2)
        for place, ((best, second), (index, _)) in enumerate(
            zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ):
            if best - second < _LEAST_MARGIN:
                num_clear[place] = min(num_clear[place], step)
            sequences[place].append(choices[index])
            logprobs[place].append(best)
    return [
        PlainAnswer(tuple(ids[len(prompt) :][:clear]), tuple(scores[:clear]))
        for ids, prompt, scores, clear in zip(sequences, prompts, logprobs, num_clear, strict=True)
    ]
