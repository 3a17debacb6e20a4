"""Runs a step plan on the model: owns the KV memory, the forward and the sampling."""

from itertools import islice, takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import BlockTable, make_batch
from engine.chunk_result import NO_TOKEN, ChunkResult
from engine.model.transformer import Transformer
from engine.ops.native.library import native_ops
from engine.progress import Progress
from engine.sampler import log_probabilities, sample
from engine.sampling_rows import SamplingRows
from engine.step_plan import StepPlan
from memory_ops.anonymous import anonymous_zeros


class Runner:
    """A model with KV blocks for it, on the model's device and in its dtype."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        eos_ids: frozenset[int],
        progress: Progress,
    ) -> None:
        config = model.config
        weight = model.model.embed_tokens.weight
        self._model = model
        self._block_size = block_size
        self._sampling_rows = SamplingRows(eos_ids)
        self._device = weight.device
        self._block_table = BlockTable()
        self._progress = progress
        native = native_ops(weight.device, weight.dtype)
        if native is not None:
            progress.watch(lambda: native.work_done)
        for table in model.tables.values():
            table.watch(progress.mark)
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        self._kv_blocks = _kv_memory(shape, weight)

    @torch.inference_mode()
    def run(
        self, plan: StepPlan, bitmask: NDArray[np.uint32] | None = None
    ) -> dict[str, ChunkResult]:
        """Run the plan's chunks; return what each gave, by request.

        ``bitmask`` has a row for each sampled position of the plan, in order; see ``sample``.
        """
        batch = make_batch(plan, self._block_size, self._device, self._block_table)
        output = self._model(
            batch.ids_T,
            batch.layout,
            batch.logits_at_L,
            self._kv_blocks,
            on_layers=self._progress.mark,
        )
        self._progress.mark()
        rows = self._sampling_rows.of(plan)
        ids = sample(output.logits_LV[: len(rows)], rows, bitmask) if rows else []
        self._progress.mark()
        return _results(plan, ids, output.logits_LV, self._progress)


def _kv_memory(shape: tuple[int, ...], weight: Tensor) -> Tensor:
    if weight.device.type == "cpu":
        # an idle pool takes no memory
        return anonymous_zeros(shape, weight.dtype)
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


def _results(
    plan: StepPlan, ids: list[int], logits_LV: Tensor, progress: Progress
) -> dict[str, ChunkResult]:
    """Deal the chosen ids out to the chunks, with the log-probabilities that each asked for."""
    chosen: list[list[int]] = []
    entries: list[tuple[int, int, int]] = []  # row of the logits, token id, count
    numbers: list[tuple[int, int]] = []  # of entries of each chunk, for the chosen and the prompt
    sampled, scored = 0, len(ids)
    for chunk in plan.chunks:
        params, before = chunk.sampling, len(entries)
        own = ids[sampled : sampled + chunk.num_sampled]
        chosen.append(own)
        if params.logprobs is not None:
            scorable = takewhile(lambda token_id: token_id != NO_TOKEN, own)
            entries += [(sampled + i, t, params.logprobs) for i, t in enumerate(scorable)]
        num_chosen = len(entries) - before
        if params.prompt_logprobs is not None:
            count = params.prompt_logprobs
            entries += [(scored + i, t, count) for i, t in enumerate(chunk.scores)]
        numbers.append((num_chosen, len(entries) - before - num_chosen))
        sampled += len(own)
        scored += len(chunk.scores)
    logprobs = log_probabilities(logits_LV, *zip(*entries, strict=True)) if entries else iter(())
    results: dict[str, ChunkResult] = {}
    for chunk, own, (num_chosen, num_scored) in zip(plan.chunks, chosen, numbers, strict=True):
        results[chunk.request_id] = ChunkResult(
            tuple(own), tuple(islice(logprobs, num_chosen)), tuple(islice(logprobs, num_scored))
        )
        progress.mark()
    return results
