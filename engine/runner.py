"""Runs a step plan on the model: owns the KV memory, the forward and the sampling."""

import torch
from torch import Tensor

from engine.batch import make_batch
from engine.model.transformer import Transformer
from engine.sampler import sample
from engine.step_plan import StepPlan
from memory_ops.anonymous import anonymous_zeros


class Runner:
    """A model with KV blocks for it, on the model's device and in its dtype."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int) -> None:
        config = model.config
        weight = model.model.embed_tokens.weight
        self._model = model
        self._block_size = block_size
        self._device = weight.device
        shape = (num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        self._kv_blocks = [_kv_memory(shape, weight) for _ in range(config.num_layers)]

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[str, int]:
        """Run the plan's chunks; return the next token of each that asks for one, by request."""
        batch = make_batch(plan, self._block_size, self._device)
        output = self._model(batch.ids_T, batch.layout, batch.logits_at_L, self._kv_blocks)
        if not batch.sampled:
            return {}
        token_ids = sample(
            output.logits_LV,
            [chunk.sampling for chunk in batch.sampled if chunk.sampling is not None],
            [chunk.seed for chunk in batch.sampled],
            [chunk.end for chunk in batch.sampled],
        )
        ids = (chunk.request_id for chunk in batch.sampled)
        return dict(zip(ids, token_ids, strict=True))


def _kv_memory(shape: tuple[int, ...], weight: Tensor) -> Tensor:
    if weight.device.type == "cpu":
        # an idle pool takes no memory
        return anonymous_zeros(shape, weight.dtype)
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
