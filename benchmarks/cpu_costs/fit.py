"""Fits the costs of ``CpuCosts`` to timed steps."""

from collections.abc import Sequence
from dataclasses import asdict, fields

import numpy as np
from scipy.optimize import nnls

from benchmarks.cpu_costs.timed_steps import Sample
from server.plan.cpu_time import CpuCosts, cpu_seconds
from server.plan.step_time import step_seconds

NAMES = tuple(one.name for one in fields(CpuCosts))
_FREE = CpuCosts(**dict.fromkeys(NAMES, 0.0))


def planned_seconds(sample: Sample, costs: CpuCosts, *, efficiency: float, threads: int) -> float:
    """The seconds that ``memplus plan`` expects of a step if ``costs`` are those of the CPU."""
    return step_seconds(
        sample.work,
        sample.limits,
        sample.step.chunks,
        sample.step.num_logits,
        efficiency=efficiency,
        threads=threads,
        costs=costs,
    )


def fitted_costs(samples: Sequence[Sample], *, efficiency: float, threads: int) -> CpuCosts:
    """The costs, none below 0, with the least sum of squared relative errors."""
    shares_SC = np.array([_shares(sample, threads) for sample in samples])
    seconds_S = np.array([sample.step.seconds for sample in samples])
    bounds_S = np.array(
        [planned_seconds(one, _FREE, efficiency=efficiency, threads=threads) for one in samples]
    )
    relative_SC = shares_SC / seconds_S[:, None]
    # the solver loses precision if one cost is a billionth of another
    scales_C = np.linalg.norm(relative_SC, axis=0)
    scales_C[scales_C == 0] = 1.0
    found_C, _ = nnls(relative_SC / scales_C, 1 - bounds_S / seconds_S)
    return CpuCosts(**dict(zip(NAMES, (found_C / scales_C).tolist(), strict=True)))


def _shares(sample: Sample, threads: int) -> list[float]:
    """The seconds that the plan adds per second of each cost: it is linear in all of them."""
    config, chunks = sample.work.config, sample.step.chunks
    return [
        cpu_seconds(config, chunks, threads, CpuCosts(**asdict(_FREE) | {name: 1.0}))
        for name in NAMES
    ]
