"""A tiny memory model and facts that its rows can learn."""

import torch

from engine.model.transformer import Transformer
from tests.models import feed_forward_changes, random_model, tiny_config
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.training.packing import Passage

FACTS = [
    Passage((5, 9, 2, 8, 1), 2),
    Passage((7, 3, 40, 41), 2),
    Passage((30, 31, 32, 33, 34, 35), 3),
]
BACKGROUND = [Passage(tuple(range(first, first + 9))) for first in range(100, 180, 11)]
LEARNING = LearningConfig(
    steps=80,
    warmup_steps=2,
    cooldown_steps=5,
    batch_tokens=40,
    replay_share=0.5,
    background_tokens=300,
    divergence_weight=0.1,
)
ROWS = RowConfig(rows=200, optimizer="adam", lr=3.0)


def wide_model(last: str = "memory_plus") -> Transformer:
    """A model of two layers whose memory of 256 rows can learn a few words."""
    return memory_model("dense", last, num_subkeys=16, top_k=4)


def memory_model(*kinds: str, **memory) -> Transformer:
    """A model of four layers, by default two of them memory_plus on one table of 64 rows."""
    torch.manual_seed(7)
    kinds = kinds or ("dense", "memory_plus", "dense", "memory_plus")
    return random_model(tiny_config(**feed_forward_changes(*kinds, **memory)))
