"""Scores of a patched model: exact answers, and its divergence from the unpatched model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from engine.model.transformer import Transformer
from weights.errors import TrainingError
from weights.training.loss import batch_output
from weights.training.packing import IGNORED_TARGET, Passage, packed_batches
from weights.training.token_stream import PackedTokens

# tokens of a batch to score: their logits take much memory
SCORED_TOKENS = 1024


@dataclass(frozen=True)
class DriftScore:
    """Divergence of a patched model from the unpatched one on neutral text.

    Attributes:
        tokens: number of predicted tokens.
        perplexity_before: perplexity of the unpatched model.
        perplexity: perplexity of the model.
        divergence: mean KL(unpatched model || model) per token, in nats.
    """

    tokens: int
    perplexity_before: float
    perplexity: float
    divergence: float


def answered(logits_LV: Tensor, batch: PackedTokens) -> list[bool]:
    """For each passage, whether the likeliest tokens are its answer; given tokens do not count.

    This is so if and only if greedy decoding after the given tokens gives these tokens.
    """
    targets_L = torch.from_numpy(batch.targets_T).to(logits_LV.device)
    is_right_L = (logits_LV.argmax(dim=-1) == targets_L) | (targets_L == IGNORED_TARGET)
    return [bool(is_right_L[first:last].all()) for first, last in pairwise(batch.starts)]


@torch.no_grad()
def exact_answers(
    model: Transformer, passages: Sequence[Passage], dtype: torch.dtype = torch.float32
) -> list[bool]:
    """For each passage, whether its tokens are exact.

    They are if and only if greedy decoding after the given tokens gives these tokens. An answer
    that other tokens spell is wrong here, but right for ``score_recall``, which compares text.
    ``dtype`` is that of ``batch_output``: bfloat16 needs an fp32 model.

    Raises:
        TrainingError: a logit is not finite.
    """
    exact: list[bool] = []
    for batch in packed_batches(passages, SCORED_TOKENS):
        exact += answered(_logits(model, batch, dtype), batch)
    return exact


@torch.no_grad()
def score_drift(
    base: Transformer,
    model: Transformer,
    passages: Sequence[Passage],
    dtype: torch.dtype = torch.float32,
) -> DriftScore:
    """Compare a model with its unpatched form on texts.

    Raises:
        TrainingError: a logit is not finite.
    """
    tokens, before, after, moved = 0, 0.0, 0.0, 0.0
    for batch in packed_batches(passages, SCORED_TOKENS):
        base_LV = _logits(base, batch, dtype).float()
        logits_LV = _logits(model, batch, dtype).float()
        targets_L = torch.from_numpy(batch.targets_T).to(logits_LV.device)
        before += float(functional.cross_entropy(base_LV, targets_L, reduction="sum"))
        after += float(functional.cross_entropy(logits_LV, targets_L, reduction="sum"))
        moved += float(divergence(base_LV, logits_LV))
        tokens += len(targets_L)
    return DriftScore(
        tokens, _perplexity(before / tokens), _perplexity(after / tokens), moved / tokens
    )


def divergence(base_LV: Tensor, logits_LV: Tensor) -> Tensor:
    """Sum over tokens of KL(base || model), in nats, from logits."""
    return functional.kl_div(
        logits_LV.log_softmax(-1), base_LV.log_softmax(-1), log_target=True, reduction="sum"
    )


def _logits(model: Transformer, batch: PackedTokens, dtype: torch.dtype) -> Tensor:
    logits_LV = batch_output(model, batch, dtype).logits_LV
    if not bool(logits_LV.isfinite().all()):
        raise TrainingError("the model's logits are not finite")
    return logits_LV


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
