"""Training steps of whole models on drawn tokens: a memory model by tier, and its dense twin."""

from collections.abc import Callable
from math import isqrt

import numpy as np
import torch

from benchmarks.training_scale import TrainingScale, memory_twin
from engine.model.config import ModelConfig
from weights.training.loss import batch_loss
from weights.training.new_model import new_model
from weights.training.optimizer import Optimizer
from weights.training.token_stream import PackedTokens
from weights.training.train_config import OptimizerConfig


def timed_models(scale: TrainingScale) -> dict[str, Callable[[PackedTokens], None]]:
    """Steps of each model by its name; all models are made at once."""
    assert scale.model is not None
    memory = memory_twin(scale.model, isqrt(scale.peer_rows))
    steps = {"dense model": _step(scale.model, scale.device, "device")}
    steps["memory model"] = _step(memory, scale.device, "device")
    if scale.device == "cuda":
        steps["memory model, host"] = _step(memory, scale.device, "host")
    return steps


def drawn_batch(scale: TrainingScale) -> PackedTokens:
    """Random tokens, in sequences as long as the model allows."""
    assert scale.model is not None
    count, length = scale.model_tokens, scale.model.max_positions
    ids_T, targets_T = np.random.default_rng().integers(0, scale.model.vocab_size, (2, count))
    positions_T = np.arange(count) % length
    return PackedTokens(ids_T, targets_T, positions_T, (*range(0, count, length), count))


def _step(config: ModelConfig, device: str, table_tier: str) -> Callable[[PackedTokens], None]:
    model, tables = new_model(config, 0, device=device, table_tier=table_tier)
    optimizer = Optimizer(model, list(tables.values()), OptimizerConfig())

    def step(batch: PackedTokens) -> None:
        loss = batch_loss(model, batch, torch.bfloat16)
        (loss.total / len(batch.ids_T)).backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0)
        wait_for(device)

    return step


def wait_for(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
