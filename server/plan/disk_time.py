"""Time that reads of table rows from disk add to a step."""

from engine.executors.cpu.micro_batches import CPU_SPLIT_RULE
from engine.executors.micro_batch_count import LayerReads, ModelReads
from engine.model.config import ModelConfig
from server.plan.machine import DiskLimits

# seconds in which a CPU finds a slot for a row, submits its read and completes it: fitted to a
# sweep of `memplus bench memory`, with an assumed latency of 100 µs
_READ_WORK = 3.3e-6


def cpu_micro_batches(config: ModelConfig, tokens: int, reads: float, cached_rows: int) -> int:
    """Micro-batches of a step on a CPU, by the rule of its executor.

    Args:
        config: the model, which has tables.
        tokens: tokens of the step.
        reads: rows that it reads from disk, in all layers.
        cached_rows: rows of each table that its cache holds.
    """
    memory = config.memory
    assert memory is not None
    layers = tuple(
        LayerReads(
            memory.num_heads * memory.top_k, 2 if config.feed_forward[layer] == "peer" else 1
        )
        for layer in config.memory_layers
    )
    model = ModelReads(layers, memory.num_rows, cached_rows)
    return model.count(CPU_SPLIT_RULE, tokens, reads / (tokens * model.token_rows))


def seconds_from_disk(
    config: ModelConfig,
    disk: DiskLimits,
    seconds: float,
    reads: float,
    *,
    micro_batches: int,
    is_on_gpu: bool,
) -> float:
    """Seconds of a step that takes ``seconds`` in memory and has to read some rows from disk.

    Each memory layer waits for its own reads, as in a decode step. A PEER layer reads its two
    tables at the same time. Of several micro-batches, all but the first one's reads overlap with
    the others' layers. The reads of PEER layers do not: their first lookup ends before another
    micro-batch runs.

    Args:
        config: the model, which has tables.
        disk: the disk's limits.
        seconds: the time of the step with all rows in memory, with its micro-batches.
        reads: rows that it reads from disk, in all layers.
        micro_batches: parts of the step that overlap, at least 1.
        is_on_gpu: whether the device that computes is a GPU.
    """
    assert config.memory is not None
    if not reads:
        return seconds
    layers = len(config.memory_layers)
    reading = min(reads, layers) * disk.latency_s + reads / disk.reads_per_s
    working = seconds + (0.0 if is_on_gpu else reads * _READ_WORK)
    if micro_batches == 1:
        return working + reading
    blocking = reading * 2 * config.feed_forward.count("peer") / config.table_lookups
    hidden = reading - blocking
    return blocking + max(working, hidden) + min(working, hidden) / micro_batches
