"""A finished model, the same with memories beside its feed-forwards, and their adapter."""

from pathlib import Path

import torch

from engine.model.config import MemoryConfig
from engine.model.transformer import Transformer
from tests.models import random_model, random_weights, save_model, tiny_config
from weights.adapters.memory_adapter import write_adapter

IDS = list(range(5, 30))


def grown_model(folder: Path) -> Transformer:
    """Save the three as ``base``, ``grown`` and ``adapter``; return the model with memories."""
    torch.manual_seed(4)
    base = random_weights(tiny_config())
    memory = MemoryConfig(
        num_heads=2,
        num_subkeys=8,
        top_k=3,
        query_dim=8,
        value_dim=32,
        placement="beside",
        scalar_gate=True,
    )
    kinds = ("memory_plus", "memory_plus")
    grown = random_model(tiny_config(feed_forward=kinds, memory=memory))
    grown.load_state_dict(grown.state_dict() | base.state_dict())
    save_model(base, folder / "base"), save_model(grown, folder / "grown")
    write_adapter(folder / "grown", folder / "base", folder / "adapter")
    return grown
