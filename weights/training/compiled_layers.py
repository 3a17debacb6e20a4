"""Compiles the dense parts of a model to train: norms and dense feed-forwards."""

import torch
from torch import nn

from engine.errors import ConfigError
from engine.model.feed_forward import DenseFeedForward
from engine.model.transformer import Transformer


def compile_dense(model: Transformer, device: str) -> None:
    """Let ``torch.compile`` fuse the element-wise work of each layer, in place.

    Attention and memories stay as they are: their kernels are not torch's. Shapes are dynamic from
    the start, so that a resumed run uses the same code as the run that it continues. The code is
    compiled in the first step.

    Raises:
        ConfigError: ``torch.compile`` cannot compile for the device here.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"run.compile: torch.compile does not work here: {why}") from None
    for layer in model.layers:
        modules: list[nn.Module] = [layer.input_layernorm, layer.post_attention_layernorm]
        if isinstance(layer.feed_forward, DenseFeedForward):
            modules.append(layer.feed_forward)
        for module in modules:
            module.compile(dynamic=True)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
