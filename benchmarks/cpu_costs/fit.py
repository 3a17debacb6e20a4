"""Fits the costs of ``CpuCosts`` to timed steps."""

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
from scipy.optimize import nnls

from benchmarks.cpu_costs.timed_steps import Sample
from server.plan.cpu_time import CPU_COSTS, CpuCosts, cpu_seconds
from server.plan.step_time import step_seconds

NAMES = tuple(one.name for one in fields(CpuCosts))
# of drawn models, all of these grow alike: a fit cannot tell one from the others
KEPT = ("subkey", "row", "row_value")
_FREE = CpuCosts(**dict.fromkeys(NAMES, 0.0))
_FITTED = tuple(name for name in NAMES if name not in KEPT)


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
    """The costs, none below 0, with the least sum of squared relative errors.

    Those of ``KEPT`` stay as they are in use.
    """
    kept = replace(_FREE, **{name: getattr(CPU_COSTS, name) for name in KEPT})
    shares_SC = np.array([_shares(sample, threads) for sample in samples])
    seconds_S = np.array([sample.step.seconds for sample in samples])
    bounds_S = np.array(
        [planned_seconds(one, kept, efficiency=efficiency, threads=threads) for one in samples]
    )
    relative_SC = shares_SC / seconds_S[:, None]
    # the solver loses precision if one cost is a billionth of another
    scales_C = np.linalg.norm(relative_SC, axis=0)
    scales_C[scales_C == 0] = 1.0
    found_C, _ = nnls(relative_SC / scales_C, 1 - bounds_S / seconds_S)
    return replace(kept, **dict(zip(_FITTED, (found_C / scales_C).tolist(), strict=True)))


def _shares(sample: Sample, threads: int) -> list[float]:
    """The seconds that the plan adds per second of each fitted cost: it is linear in all."""
    step = sample.work.config, sample.work.row_bytes, sample.step.chunks, threads
    return [cpu_seconds(*step, replace(_FREE, **{name: 1.0})) for name in _FITTED]
