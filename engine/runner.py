"""Runs a step plan on the model: owns the KV memory, the forward and the sampling."""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import make_batch
from engine.chunk_result import NO_TOKEN, ChunkResult
from engine.model.transformer import Transformer
from engine.request import TokenLogprobs
from engine.sampler import log_probabilities, sample
from engine.step_plan import StepPlan
from memory_ops.anonymous import anonymous_zeros


class Runner:
    """A model with KV blocks for it, on the model's device and in its dtype."""

    def __init__(
        self, model: Transformer, num_blocks: int, block_size: int, eos_ids: frozenset[int]
    ) -> None:
        config = model.config
        weight = model.model.embed_tokens.weight
        self._model = model
        self._block_size = block_size
        self._eos_ids = eos_ids
        self._device = weight.device
        shape = (num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        self._kv_blocks = [_kv_memory(shape, weight) for _ in range(config.num_layers)]

    @torch.inference_mode()
    def run(
        self, plan: StepPlan, bitmask: NDArray[np.uint32] | None = None
    ) -> dict[str, ChunkResult]:
        """Run the plan's chunks; return what each gave, by request.

        ``bitmask`` has a row for each sampled position of the plan, in order; see ``sample``.
        """
        batch = make_batch(plan, self._block_size, self._device)
        output = self._model(batch.ids_T, batch.layout, batch.logits_at_L, self._kv_blocks)
        num_rows = len(batch.rows)
        sampled_LV, scored_LV = output.logits_LV[:num_rows], output.logits_LV[num_rows:]
        ids = sample(sampled_LV, batch.rows, self._eos_ids, bitmask) if num_rows else []
        results: dict[str, ChunkResult] = {}
        sampled = scored = 0
        for chunk in plan.chunks:
            own = ids[sampled : sampled + chunk.num_sampled]
            scorable = list(takewhile(lambda token_id: token_id != NO_TOKEN, own))
            results[chunk.request_id] = ChunkResult(
                tuple(own),
                _logprobs(sampled_LV, sampled, scorable, chunk.sampling.logprobs),
                _logprobs(scored_LV, scored, chunk.scores, chunk.sampling.prompt_logprobs),
            )
            sampled += chunk.num_sampled
            scored += len(chunk.scores)
        return results


def _kv_memory(shape: tuple[int, ...], weight: Tensor) -> Tensor:
    if weight.device.type == "cpu":
        # an idle pool takes no memory
        return anonymous_zeros(shape, weight.dtype)
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


def _logprobs(
    logits_LV: Tensor, start: int, token_ids: Sequence[int], count: int | None
) -> tuple[TokenLogprobs, ...]:
    if count is None or not token_ids:
        return ()
    return tuple(log_probabilities(logits_LV[start : start + len(token_ids)], token_ids, count))
