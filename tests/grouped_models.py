"""Models whose weights are in groups."""

from collections.abc import Mapping

import torch

from engine.model.grouped_layers import groupable, use_groups
from engine.model.grouped_weights import WeightGroups, group_weights
from engine.model.transformer import Transformer
from engine.model.weight_bits import HEAD_BITS

HEADS = ("model.embed_tokens", "lm_head")


def in_groups(model: Transformer, dtype: str) -> Transformer:
    """A copy of a model with weights in groups, as ``memplus quantize`` makes them."""
    weights = {name: model.get_submodule(name).weight for name in groupable(model)}
    return with_groups(
        model,
        {
            name: group_weights(weight, HEAD_BITS if name in HEADS else int(dtype[3:]))
            for name, weight in weights.items()
        },
    )


def with_groups(model: Transformer, groups: Mapping[str, WeightGroups]) -> Transformer:
    """A copy of a model with some weights, by layer, in groups."""
    state = model.state_dict()
    for layer, one in groups.items():
        state |= {f"{layer}.{name}": tensor for name, tensor in one.tensors.items()}
    with torch.device("meta"):
        made = Transformer(model.config)
        use_groups(made, {name: one.format for name, one in groups.items()})
    made.load_state_dict(state, assign=True)
    made.attach_tables(model.tables)
    return made.eval().requires_grad_(False)
