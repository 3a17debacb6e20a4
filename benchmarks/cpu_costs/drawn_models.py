"""Models of drawn shapes and weights, whose steps the costs are fitted to."""

import random
from math import isqrt

import torch

from engine.model.config import MemoryConfig, ModelConfig
from engine.model.transformer import Transformer
from memory_ops.tables.device import DeviceTable
from weights.training.initialise import initialise, initialise_table

_WIDTHS = (128, 192, 256, 384, 512, 768, 1024)
_LAYERS = (1, 2, 4, 8, 12)
_VOCABULARIES = (4096, 16_384, 32_768)
_MEMORIES = (None, "memory_plus", "pkm")
_TABLE_VALUES = 2**25  # 64 MiB in bfloat16, more than most caches have
DTYPE = torch.bfloat16


def drawn_config(rng: random.Random, max_positions: int) -> ModelConfig:
    """A dense model, or one whose middle layers are memory layers."""
    width, num_layers = rng.choice(_WIDTHS), rng.choice(_LAYERS)
    head_dim = rng.choice((32, 64))
    num_heads = width // head_dim
    kind = rng.choice(_MEMORIES)
    kinds = ["dense"] * num_layers
    memory = None
    if kind is not None:
        for layer in {num_layers // 3, num_layers // 2}:
            kinds[layer] = kind
        # whole groups of 16 subkeys, as models have them
        most_subkeys = isqrt(_TABLE_VALUES // width) // 16 * 16
        memory = MemoryConfig(
            num_heads=rng.choice((2, 4)),
            num_subkeys=rng.choice((128, most_subkeys)),
            top_k=rng.choice((16, 32)),
            query_dim=width // 2,
            value_dim=width,
            qk_norm=True,
        )
    return ModelConfig(
        vocab_size=rng.choice(_VOCABULARIES),
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 32 * 32,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // rng.choice([n for n in (1, 2, 3, 4) if num_heads % n == 0]),
        head_dim=head_dim,
        max_positions=max_positions,
        tie_embeddings=True,
        feed_forward=tuple(kinds),
        memory=memory,
    )


@torch.no_grad()
def drawn_model(config: ModelConfig, seed: int) -> Transformer:
    """The model in ``DTYPE``, with its tables in memory."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    initialise(model, generator)
    model = model.to(DTYPE).eval().requires_grad_(False)
    if config.memory is not None:
        tables = {}
        for name in config.table_names:
            rows_RV = torch.empty(config.memory.num_rows, config.memory.value_dim)
            initialise_table(rows_RV, generator)
            tables[name] = DeviceTable(rows_RV.to(DTYPE))
        model.attach_tables(tables)
    return model
