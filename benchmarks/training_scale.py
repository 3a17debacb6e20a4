"""Sizes of ``memplus bench train`` on a CPU and on a GPU."""

from dataclasses import dataclass, replace

from engine.model.config import MemoryConfig, ModelConfig


@dataclass(frozen=True)
class TrainingScale:
    """Sizes of the timed steps; ``model`` is the dense twin of the timed memory model, if any.

    Attributes:
        device: device that trains.
        table_rows: sizes of the tables whose steps read ``distinct_rows`` rows of ``width``.
        distinct_rows: distinct rows of a step; the same for every size, so that only sizes differ.
        width: values per row.
        peer_rows: rows of the table of which torch's optimisers are timed too.
        peer_width: values per row of that table.
        tokens: tokens of a step that each read 4 heads x 32 rows.
        model: a dense model; see ``memory_twin``.
        model_tokens: tokens of a step of whole models.
    """

    device: str
    table_rows: tuple[int, ...]
    distinct_rows: int
    width: int
    peer_rows: int
    peer_width: int
    tokens: int
    model: ModelConfig | None = None
    model_tokens: int = 0


CPU_SCALE = TrainingScale(
    device="cpu",
    table_rows=(2**16, 2**18, 2**20, 2**22),
    distinct_rows=2**16,
    width=256,
    peer_rows=2**20,
    peer_width=256,
    tokens=1024,
)
# the size that "Memory Layers at Scale" (arXiv 2412.09764) calls 373m
_DENSE = ModelConfig(
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    max_positions=2048,
    rope_theta=10_000.0,
    tie_embeddings=False,
)
GPU_SCALE = TrainingScale(
    device="cuda",
    table_rows=(2**18, 2**20, 2**22, 2**24),
    distinct_rows=2**16,
    width=256,
    peer_rows=2**20,
    peer_width=1024,
    tokens=1024,
    model=_DENSE,
    model_tokens=16_384,
)


def memory_twin(dense: ModelConfig, num_subkeys: int) -> ModelConfig:
    """The model with Memory+ in place of the feed-forwards of three evenly spaced layers."""
    step = max(dense.num_layers // 3, 1)
    chosen = range(step // 2, dense.num_layers, step)
    kinds = ("memory_plus" if layer in chosen else "dense" for layer in range(dense.num_layers))
    memory = MemoryConfig(
        num_heads=4,
        num_subkeys=num_subkeys,
        top_k=min(32, num_subkeys),
        query_dim=dense.hidden_size // 2,
        value_dim=dense.hidden_size,
        qk_norm=True,
    )
    return replace(dense, feed_forward=tuple(kinds), memory=memory)
