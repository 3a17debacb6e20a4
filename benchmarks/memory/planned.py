"""The prediction of ``memplus plan`` for a round of ``memplus bench memory``."""

from collections.abc import Callable

import torch

from benchmarks.memory.load import Point, Round
from benchmarks.memory.readers import Reader
from engine.model.machine_limits import MachineLimits
from server.plan.disk_time import cpu_micro_batches, seconds_from_disk
from server.plan.machine import DiskLimits
from server.plan.options import EFFICIENCY
from server.plan.step_time import step_seconds


def planned_tokens_per_s(
    done: Round,
    reader: Reader,
    point: Point,
    measure: Callable[[], MachineLimits],
    disk: DiskLimits | None,
) -> float | None:
    """Tokens per second that the plan predicts for the steps of the reader's last round.

    ``measure`` gives the limits of memory and products; it is called only if there is a prediction.
    The plan gets the rows per token that the round read from disk. None for mapped files, which it
    does not know, with lookahead, whose reads overlap with earlier layers, and if the disk of a
    table was not measured.
    """
    if point.tier == "mmap" or point.lookahead or (disk is None and reader.disk_tables):
        return None
    work, limits = reader.work, measure()
    tokens, planned = 0, 0.0
    for step in reader.steps:
        count, reads, micro_batches = sum(chunk.count for chunk in step.chunks), 0.0, 1
        if disk is not None:
            assert done.reads_per_token is not None
            reads = done.reads_per_token * count
            cached_rows = min(table.num_slots for table in reader.disk_tables)
            micro_batches = cpu_micro_batches(work.config, count, reads, cached_rows)
        seconds = step_seconds(
            work,
            limits,
            step.chunks,
            step.num_logits,
            efficiency=EFFICIENCY,
            threads=torch.get_num_threads(),
            micro_batches=micro_batches,
        )
        if disk is not None:
            seconds = seconds_from_disk(
                work.config,
                disk,
                seconds,
                reads,
                micro_batches=micro_batches,
                is_on_gpu=False,
            )
        tokens, planned = tokens + count, planned + seconds
    return tokens / planned
