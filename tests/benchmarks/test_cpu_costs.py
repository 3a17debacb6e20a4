"""``memplus bench cpu-costs``: it finds the costs that steps were made of."""

import importlib.util
import json
import random
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.cpu_costs import run, timed_steps
from benchmarks.cpu_costs.drawn_models import DTYPE, drawn_config, drawn_model
from benchmarks.cpu_costs.fit import KEPT, NAMES, fitted_costs, planned_seconds
from benchmarks.cpu_costs.timed_steps import Sample
from benchmarks.engine_rounds import TimedStep
from engine.model.machine_limits import MachineLimits
from engine.model.step_work import Chunk, ModelWork
from server.cli.main import main
from server.plan.cpu_time import CPU_COSTS, CpuCosts
from tests.models import feed_forward_changes, tiny_config

LIMITS = MachineLimits(30.0, 400.0)


def steps_of(rng):
    """Chunks of prompts and of decode steps."""
    for length in (4, 64, 256):
        yield (Chunk(0, length),)
    for batch in (1, 3, 40):
        yield tuple(Chunk(rng.randrange(400), 1) for _ in range(batch))


def made_of(costs, threads):
    """Samples that take just what the plan says, with these costs."""
    rng = random.Random(0)
    for _ in range(8):
        config = drawn_config(rng, 512)
        row_bytes = 2 * config.memory.value_dim if config.memory is not None else 0
        work = ModelWork(config, DTYPE.itemsize, row_bytes)
        for chunks in steps_of(rng):
            sample = Sample(work, LIMITS, TimedStep(0.0, chunks, 1))
            seconds = planned_seconds(sample, costs, efficiency=0.85, threads=threads)
            yield Sample(work, LIMITS, TimedStep(seconds, chunks, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_fit_finds_the_costs_that_steps_were_made_of(threads):
    kept = {name: getattr(CPU_COSTS, name) for name in KEPT}
    others = {"step": 3e-4, "sequence": 2e-5, "prompt": 1e-4, "element": 3e-9}
    true = CpuCosts(**kept, **others, kv_position=4e-9, pair=7e-10, far_row=5e-8)
    found = fitted_costs(list(made_of(true, threads)), efficiency=0.85, threads=threads)
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-4), name


def test_no_cost_is_below_zero():
    """Steps that are faster than the bound leave nothing to add."""
    samples = [
        Sample(one.work, one.limits, TimedStep(one.step.seconds / 2, one.step.chunks, 1))
        for one in made_of(CpuCosts(**dict.fromkeys(NAMES, 0.0)), 1)
    ]
    found = fitted_costs(samples, efficiency=0.85, threads=1)
    kept = {name: getattr(CPU_COSTS, name) for name in KEPT}
    assert asdict(found) == dict.fromkeys(NAMES, 0.0) | kept


def test_drawn_models_depend_on_the_seed_alone_and_have_all_kinds():
    rng, again = random.Random(3), random.Random(3)
    configs = [drawn_config(rng, 512) for _ in range(40)]
    assert configs == [drawn_config(again, 512) for _ in range(40)]
    assert {"dense", "memory_plus", "pkm"} == {kind for one in configs for kind in one.feed_forward}
    assert all(len(one.memory_layers) in (1, 2) for one in configs if one.memory is not None)


def test_a_drawn_model_has_tables_and_its_dtype():
    config = tiny_config(**feed_forward_changes("dense", "memory_plus"))
    model = drawn_model(config, 0)
    assert {table.num_rows for table in model.tables.values()} == {64}
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPE}


def test_the_verb_times_models_and_writes_each_step(tmp_path, monkeypatch, capsys):
    config = tiny_config(**feed_forward_changes("dense", "memory_plus"), max_positions=2048)
    monkeypatch.setattr(run, "drawn_config", lambda rng, max_positions: config)
    monkeypatch.setattr(timed_steps, "_PROMPTS", (4, 16))
    monkeypatch.setattr(timed_steps, "_DECODES", ((1, 8), (3, 8)))
    monkeypatch.setattr(timed_steps, "_ROUNDS", 1)
    monkeypatch.setattr(timed_steps.LimitMeter, "measure", lambda meter: LIMITS)
    run.measure(2, 0, tmp_path / "steps.json")
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert len(steps) == 8
    assert [one["sequences"] for one in steps] == [1, 1, 1, 3] * 2
    assert [one["first_chunk"]["count"] for one in steps] == [4, 16, 1, 1] * 2
    assert all(one["seconds"] > 0 and one["limits"]["gflops"] == 400 for one in steps)
    planned = np.array([one["planned_over_measured_speed"]["in use"] for one in steps])
    assert np.isfinite(planned).all()
    printed = capsys.readouterr().out
    assert "8 steps of 2 models, seed 0" in printed
    assert all(f"{name} " in printed for name in NAMES)


def test_there_must_be_a_model(capsys):
    assert main(["bench", "cpu-costs", "--models", "0"]) == 2
    assert "--models: must be at least 1, not 0" in capsys.readouterr().err


def test_an_installation_without_scipy_is_told_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "cpu-costs"]) == 2
    assert "bench cpu-costs: needs scipy" in capsys.readouterr().err
