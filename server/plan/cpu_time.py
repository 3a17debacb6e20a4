"""Time that a CPU adds to a step: work that neither its bytes nor its products bound."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.model.config import ModelConfig
from engine.model.step_work import Chunk


@dataclass(frozen=True)
class CpuCosts:
    """Seconds of one thread, fitted to steps of random models on an AMD EPYC (Zen 4).

    ``docs/planning.md`` describes the fit and its errors. The threads of a step share all but
    ``step``, ``sequence`` and ``prompt``.

    Attributes:
        step: scheduling, the batch, and the native calls.
        sequence: choosing a token and feeding it back.
        prompt: the first or only part of a prompt: checking it, and reserving its blocks.
        element: one computed activation value of norms, rotation, gates or conversions.
        kv_position: a position that one token attends to, for each KV head.
        pair: a token of a prompt and a position that it attends to, for each head.
        subkey: the score of a subkey, among which the best are chosen.
        row: a table row.
        far_row: in addition, a row that no cache of the CPU has.
        row_value: a value of a table row.
    """

    step: float = 1.7e-4
    sequence: float = 2.4e-5
    prompt: float = 2.3e-4
    element: float = 2.2e-9
    kv_position: float = 7.3e-9
    pair: float = 1.4e-9
    subkey: float = 1.5e-9
    row: float = 1.5e-8
    far_row: float = 3.6e-7
    row_value: float = 2.6e-10


CPU_COSTS = CpuCosts()
# bytes of tables that stay in the CPU's caches: three quarters of that machine's L3
_CACHED_BYTES = 24 * 2**20


def cpu_seconds(
    config: ModelConfig,
    row_bytes: int,
    chunks: Sequence[Chunk],
    threads: int,
    costs: CpuCosts = CPU_COSTS,
) -> float:
    """Seconds that a CPU adds to the least time of a step.

    Args:
        config: the model.
        row_bytes: bytes of a table row; 0 without tables.
        chunks: tokens of each sequence.
        threads: threads of the CPU, at least 1.
        costs: the times of the parts.
    """
    tokens = sum(chunk.count for chunk in chunks)
    shared = tokens * _token_seconds(config, row_bytes, costs)
    for chunk in chunks:
        if chunk.count == 1:  # the kernel of one token reads all keys and values for it alone
            positions = chunk.end * config.num_layers * config.num_kv_heads
            shared += positions * costs.kv_position
        else:
            shared += chunk.pairs * config.num_layers * config.num_heads * costs.pair
    prompts = sum(chunk.count > 1 and chunk.start == 0 for chunk in chunks)
    alone = costs.step + len(chunks) * costs.sequence + prompts * costs.prompt
    return alone + shared / threads


def _token_seconds(config: ModelConfig, row_bytes: int, costs: CpuCosts) -> float:
    """Seconds of one thread for one token in all layers, without attention."""
    projected = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    elements = config.num_layers * (2 * config.hidden_size + projected)
    for layer, kind in enumerate(config.feed_forward):
        if config.has_dense(layer):
            elements += config.intermediate_size
        if kind == "moe":
            assert config.mixture is not None
            elements += config.mixture.top_k * config.mixture.expert_size
    seconds = elements * costs.element
    memory = config.memory
    if memory is not None:
        subkeys = len(config.memory_layers) * memory.num_heads * 2 * memory.num_subkeys
        table_bytes = len(config.table_names) * memory.num_rows * row_bytes
        far = max(0.0, 1 - _CACHED_BYTES / table_bytes)
        row_seconds = costs.row + far * costs.far_row + memory.value_dim * costs.row_value
        seconds += subkeys * costs.subkey + config.rows_per_token * row_seconds
    return seconds
