"""Drawn models, and the rounding of their weights in place."""

import pytest
import torch

from benchmarks.gpu.drawn_models import drawn_model, round_weights
from engine.config import EngineConfig
from engine.executors.batch import prompt_batch
from engine.executors.executor import make_executor
from engine.model.grouped_layers import group_formats
from tests.models import tiny_config
from weights.checkpoints.stored_groups import requested_formats


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_weights_are_rounded_as_at_load(dtype, tied):
    def logits(weight_dtype):
        executor = make_executor(model, config, weight_dtype=weight_dtype)
        return executor.logits(prompt_batch(range(20), config.block_size))

    config = EngineConfig(kv_cache_gib=0.001, block_size=16)
    shape = tiny_config(tie_embeddings=tied, attention_bias=True)
    model = drawn_model(shape, torch.float32, torch.device("cpu"))
    for parameter in model.parameters():
        parameter += torch.randn_like(parameter) / 10  # biases begin as 0
    wanted, formats = logits(dtype), requested_formats(shape, dtype)
    round_weights(model, formats)
    assert group_formats(model) == formats
    assert torch.equal(logits("auto"), wanted)
