"""Time that a step is expected to take with all table rows in the device's memory."""

from collections.abc import Sequence
from dataclasses import replace

from engine.model.machine_limits import MachineLimits
from engine.model.step_work import Chunk, ModelWork
from server.plan.cpu_time import CPU_COSTS, CpuCosts, cpu_seconds


def step_seconds(
    work: ModelWork,
    limits: MachineLimits,
    chunks: Sequence[Chunk],
    num_logits: int,
    *,
    efficiency: float,
    threads: int,
    micro_batches: int = 1,
    costs: CpuCosts = CPU_COSTS,
) -> float:
    """Seconds of a step that runs ``chunks``.

    Args:
        work: the model's work, or that of one tensor-parallel rank.
        limits: the machine's, or the rank's part of them.
        chunks: tokens of each sequence.
        num_logits: rows of logits.
        efficiency: the share of the limits that products and attention reach, in (0, 1].
        threads: threads of the CPU, or of the rank; 0 on a GPU, whose fixed costs are not counted.
        micro_batches: parts of the step, each of which reads all weights.
        costs: those of the CPU.
    """
    seconds = work.seconds_in_turn(chunks, num_logits, limits, micro_batches) / efficiency
    if threads:
        costs = replace(costs, row_value=costs.row_value * work.read_fraction)
        seconds += cpu_seconds(work.config, work.row_bytes, chunks, threads, costs)
    return seconds
