"""The shape of the benchmarks' memory models: Memory+ in place of three feed-forwards."""

from dataclasses import replace

from engine.model.config import MEMORY_KINDS, MemoryConfig, ModelConfig

MEMORY_LAYERS = 3  # as many as the paper's models have
NUM_HEADS, TOP_K = 4, 32


def can_have_memory(model: ModelConfig) -> bool:
    """Whether the model has enough layers, and no memory layers yet."""
    return model.num_layers > MEMORY_LAYERS and not set(model.feed_forward) & set(MEMORY_KINDS)


def with_memory(model: ModelConfig, num_subkeys: int) -> ModelConfig:
    """The model with three equally spaced Memory+ layers that share a table of N * N rows.

    They have 4 heads, 32 rows per head, and query and value widths as in the paper.

    Raises:
        ValueError: ``num_subkeys`` is less than the rows per head, or too large.
    """
    assert can_have_memory(model)
    kinds = list(model.feed_forward)
    for i in range(MEMORY_LAYERS):
        kinds[(i + 1) * model.num_layers // (MEMORY_LAYERS + 1)] = "memory_plus"
    width = model.hidden_size
    memory = MemoryConfig(
        num_heads=NUM_HEADS,
        num_subkeys=num_subkeys,
        top_k=TOP_K,
        query_dim=width // 4 * 2,
        value_dim=width,
    )
    return replace(model, feed_forward=tuple(kinds), memory=memory)
