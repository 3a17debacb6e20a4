"""Time that reads of table rows from disk add to a step."""

from engine.executors.cpu.micro_batches import CPU_SPLIT_RULE
from engine.model.config import ModelConfig
from server.plan.machine import DiskLimits

# seconds in which a CPU finds a slot for a row, submits its read and completes it: fitted to a
# sweep of `memplus bench memory`, with an assumed latency of 100 µs
_READ_WORK = 3.3e-6


def seconds_from_disk(
    config: ModelConfig,
    disk: DiskLimits,
    seconds: float,
    tokens: int,
    reads: float,
    *,
    cached_rows: int,
    is_on_gpu: bool,
) -> float:
    """Seconds of a step that takes ``seconds`` in memory and has to read some rows from disk.

    Each lookup waits for its own reads, as in a decode step. On a CPU, steps of many tokens that
    read many rows run as micro-batches: then all but the first one's reads overlap with the others'
    layers. That each micro-batch reads the weights again is not counted.

    Args:
        config: the model, which has tables.
        disk: the disk's limits.
        seconds: the time of the step with all rows in memory.
        tokens: tokens of the step.
        reads: rows that it reads from disk, in all layers.
        cached_rows: rows of each table that its cache holds.
        is_on_gpu: whether the device that computes is a GPU.
    """
    assert config.memory is not None
    if not reads:
        return seconds
    reading = min(reads, config.table_lookups) * disk.latency_s + reads / disk.reads_per_s
    working = seconds + (0.0 if is_on_gpu else reads * _READ_WORK)
    count = 1 if is_on_gpu else _micro_batches(config, tokens, reads, cached_rows)
    if count == 1:
        return working + reading
    return max(working, reading) + min(working, reading) / count


def _micro_batches(config: ModelConfig, tokens: int, reads: float, cached_rows: int) -> int:
    """Micro-batches of a step on a CPU, by the rule of its executor."""
    assert config.memory is not None
    rule, rows = CPU_SPLIT_RULE, tokens * config.memory.num_heads * config.memory.top_k
    if reads < rule.least_fraction * tokens * config.rows_per_token:
        return 1
    return rule.most(tokens) if min(rows, config.memory.num_rows) <= cached_rows else 1
