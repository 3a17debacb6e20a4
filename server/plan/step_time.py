"""The time that a step is expected to take: its least time, and what a CPU adds to it."""

from collections.abc import Sequence

from engine.model.machine_limits import MachineLimits
from engine.model.step_work import Chunk, ModelWork

# Of a CPU's step, measured with `memplus bench offline` (docs/planning.md): scheduling; choosing a
# token and feeding it back, for each sequence; and, for each sequence in each layer, a thread's
# time for norms, rotation and the fixed costs of attention.
_STEP, _SEQUENCE, _SEQUENCE_IN_LAYER = 2e-4, 2.8e-5, 1.6e-5


def step_seconds(
    work: ModelWork,
    limits: MachineLimits,
    chunks: Sequence[Chunk],
    num_logits: int,
    *,
    efficiency: float,
    threads: int,
) -> float:
    """Seconds of a step that runs ``chunks``, with all table rows in the device's memory.

    Args:
        work: the model's work.
        limits: the machine's.
        chunks: tokens of each sequence.
        num_logits: rows of logits.
        efficiency: the share of the limits that products and attention reach, in (0, 1].
        threads: threads of the CPU; 0 on a GPU, whose fixed costs are not counted.
    """
    seconds = work.seconds_in_turn(chunks, num_logits, limits) / efficiency
    if threads:
        of_sequence = _SEQUENCE + work.num_layers * _SEQUENCE_IN_LAYER / threads
        seconds += _STEP + len(chunks) * of_sequence
    return seconds
