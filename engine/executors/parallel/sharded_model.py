"""Makes the model of one tensor-parallel rank: a transformer whose layers have its share."""

import torch
from torch import nn

from engine.executors.parallel.collectives import Collectives
from engine.executors.parallel.layers import (
    GatheredColumns,
    GatheredLogits,
    SummedLinear,
    SummedMixture,
)
from engine.executors.parallel.shares import RankShare
from engine.model.memory_layer import MemoryLayer
from engine.model.mixture import MixtureFeedForward
from engine.model.transformer import Transformer
from engine.model.uninitialised import Linear


def rank_model(share: RankShare, group: Collectives) -> Transformer:
    """A model on the meta device with the parameters of one rank, to which weights are assigned.

    It has the names of the whole model, and the shapes of ``RankShare.part``. Its forward gives the
    results of the whole model, and must run on all ranks at the same time.
    """
    with torch.device("meta"):
        model = Transformer(share.config)
        for name, module in list(model.named_modules()):
            made = _of_rank(name, module, share, group)
            if made is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, made)
        for module in list(model.modules()):
            if isinstance(module, MemoryLayer) and module.value_proj is None:
                setattr(module, "value_proj", GatheredColumns(group))  # noqa: B010 (its type)
    model.head_product = GatheredLogits(share, group)
    return model


def _of_rank(
    name: str, module: nn.Module, share: RankShare, group: Collectives
) -> nn.Module | None:
    """This rank's part of a module; None if the module stays as it is."""
    config = share.config
    if isinstance(module, MixtureFeedForward):
        assert config.mixture is not None
        part = share.layer_part(f"{name}.experts.0.w1")
        assert part is not None
        return SummedMixture(config.mixture, len(part), config.hidden_size, group)
    part = share.layer_part(name)
    if part is None or ".experts." in name:
        return None
    assert isinstance(module, nn.Linear)
    has_bias = module.bias is not None
    if part.dim == 0:
        return Linear(module.in_features, len(part), bias=has_bias)
    return SummedLinear(len(part), module.out_features, has_bias, group)
