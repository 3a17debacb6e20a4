"""Runs ``memplus bench cpu-costs``: times drawn models, fits the costs, and says how well."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.cpu_costs.drawn_models import drawn_config
from benchmarks.cpu_costs.fit import NAMES, fitted_costs, planned_seconds
from benchmarks.cpu_costs.timed_steps import MAX_POSITIONS, Sample, timed_steps
from engine.errors import ConfigError
from server.allocator import keep_freed_memory
from server.plan.cpu_time import CPU_COSTS, CpuCosts
from server.plan.options import EFFICIENCY

_CLOSE = 0.25


def measure(models: int, seed: int, json_file: Path | None) -> None:
    """Time steps of ``models`` drawn models; print the fitted costs, and errors of both sets.

    Raises:
        ConfigError: there is no model, or memplus was installed without its native library.
    """
    if models < 1:
        raise ConfigError(f"models: must be at least 1, not {models}")
    keep_freed_memory()
    rng = random.Random(seed)
    samples: list[Sample] = []
    for number in tqdm(range(models), unit="model", leave=False, disable=None):
        samples += timed_steps(drawn_config(rng, MAX_POSITIONS), seed + number)
    threads = torch.get_num_threads()
    fitted = fitted_costs(samples, efficiency=EFFICIENCY, threads=threads)
    print(f"{len(samples)} steps of {models} models, seed {seed}, {threads} threads")
    print("cost             fitted    in use   (seconds)")
    for name in NAMES:
        print(f"{name:<12} {getattr(fitted, name):>10.2e}{getattr(CPU_COSTS, name):>10.2e}")
    errors = {
        "fitted": _errors(samples, fitted, threads),
        "in use": _errors(samples, CPU_COSTS, threads),
    }
    for name, found in errors.items():
        quartiles = " ".join(f"{one:+.0%}" for one in np.quantile(found, (0.25, 0.5, 0.75)))
        print(
            f"{name}: {np.mean(np.abs(found) <= _CLOSE):.0%} of the speeds within 25 %, quartiles"
            f" {quartiles}, worst {found.min():+.0%} and {found.max():+.0%}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(_as_json(samples, errors), indent=1) + "\n")


def _errors(samples: Sequence[Sample], costs: CpuCosts, threads: int) -> np.ndarray:
    """Planned speed over measured speed, minus 1, of each step."""
    planned = [
        planned_seconds(one, costs, efficiency=EFFICIENCY, threads=threads) for one in samples
    ]
    return np.array([one.step.seconds for one in samples]) / planned - 1


def _as_json(samples: Sequence[Sample], errors: dict[str, np.ndarray]) -> list[object]:
    return [
        {
            "model": asdict(one.work.config),
            "limits": asdict(one.limits),
            "sequences": len(one.step.chunks),
            "first_chunk": asdict(one.step.chunks[0]),
            "seconds": one.step.seconds,
            "planned_over_measured_speed": {name: found[i] for name, found in errors.items()},
        }
        for i, one in enumerate(samples)
    ]
