"""Stall detection: a slow step is not reported as a hang."""

from types import SimpleNamespace

import pytest
import torch

from engine import progress
from engine.config import EngineConfig
from engine.executors.cpu.kernels import CPU_LIBRARY
from engine.model.flops import StepFlops
from engine.process import HEARTBEAT_S
from engine.progress import Progress
from server.config import SupervisionOptions
from server.engine_client import WATCH_EVERY_S
from tests.models import eager, engine_of, greedy, random_model, tiny_config


@pytest.fixture
def clock(monkeypatch):
    """A fake clock that tests advance."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_mark_restarts_the_stall_time_and_an_idle_engine_does_not_stall(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    seen = Progress()
    assert seen.stalled_s == 0
    seen.mark()
    now = 103.0
    assert seen.stalled_s == 3
    seen.mark()
    assert seen.stalled_s == 0
    now = 200.0
    seen.rest()
    assert seen.stalled_s == 0

    seen.skip()
    assert seen.stalled_s == 0
    seen.mark()
    now = 300.0
    seen.skip()
    assert seen.stalled_s == 0


def test_a_step_marks_its_layers_its_logits_and_its_tokens(monkeypatch):
    engine = engine_of(
        random_model(tiny_config(num_layers=3)), EngineConfig(kv_cache_gib=0.001), make=eager
    )
    engine.add(greedy("a", [1, 2, 3], 2))
    marks = []
    monkeypatch.setattr(engine.progress, "mark", lambda: marks.append(1))
    engine.warm_up()
    assert len(marks) == 3 + 2


def test_counted_work_of_another_thread_is_progress(clock):
    done, seen = [0], Progress()
    seen.watch(lambda: done[0])
    seen.mark()
    for _ in range(5):
        clock.now += 3
        done[0] += 1
        assert seen.stalled_s == 0
    clock.now += 3
    assert seen.stalled_s == 3
    # the counter does not move in an idle engine; a later mark restarts the stall time
    seen.rest()
    assert seen.stalled_s == 0
    clock.now += 50
    seen.mark()
    clock.now += 1
    assert seen.stalled_s == 1


def test_a_pause_of_the_process_is_no_stall_of_an_idle_engine(clock):
    seen = Progress()
    seen.watch(lambda: clock.now)
    seen.skip()
    clock.now += 10
    assert seen.stalled_s == 0
    clock.now += 10
    assert seen.stalled_s == 0


def test_large_work_may_take_as_long_as_the_measured_speed_predicts(clock):
    seen = Progress()
    with seen.working(work=10.0, largest=10.0):
        seen.mark()
        clock.now += 2
        assert seen.stalled_s == 2  # no speed has been measured yet
    # measured: 5 per second; failed and slower steps do not change it
    with pytest.raises(ArithmeticError), seen.working(work=1e9, largest=1.0):
        raise ArithmeticError
    with seen.working(work=1.0, largest=1.0):
        clock.now += 1
    with seen.working(work=1000.0, largest=50.0):
        seen.mark()
        clock.now += progress._PATIENCE * 50 / 5
        assert seen.stalled_s == 0
        clock.now += 7
        assert seen.stalled_s == 7
    seen.mark()
    clock.now += 3
    assert seen.stalled_s == 3


def step_flops(config, num_tokens):
    """Operations of a prompt that runs in one step."""
    return StepFlops(config).of((0, num_tokens), (num_tokens,), 1)


@pytest.mark.parametrize("num_tokens", [100, 200])
def test_a_plain_torch_step_gets_time_in_proportion_to_its_tokens(monkeypatch, clock, num_tokens):
    config = tiny_config(num_layers=3)
    engine = engine_of(random_model(config), EngineConfig(kv_cache_gib=0.001), make=eager)

    def one_second(batch, trace):
        clock.now += 1
        return torch.zeros(1, config.vocab_size)

    monkeypatch.setattr(engine._executor, "_forward", one_second)
    engine.warm_up()
    one, _ = step_flops(config, 1)
    _, largest = step_flops(config, num_tokens)
    allowed_s = progress._PATIENCE * largest / one
    assert allowed_s > num_tokens  # far more than the timeout of 4 s

    def hangs(batch, trace):
        engine.progress.mark()
        assert engine.progress.stalled_s == 0  # reading it also takes note of earlier kernel work
        clock.now += allowed_s - 1
        assert engine.progress.stalled_s == 0
        clock.now += 11
        assert engine.progress.stalled_s == pytest.approx(10)
        raise ArithmeticError

    monkeypatch.setattr(engine._executor, "_forward", hangs)
    engine.add(greedy("a", [1] * num_tokens, 2))
    (output,) = engine.step().outputs
    assert output.error == "ArithmeticError in the engine"


@pytest.mark.skipif(CPU_LIBRARY.best_build is None, reason="built without a compiler")
def test_a_native_step_gets_no_extra_time_because_its_kernels_report_progress(monkeypatch, clock):
    engine = engine_of(random_model(tiny_config(num_layers=3)), EngineConfig(kv_cache_gib=0.001))
    engine.add(greedy("a", [1] * 100, 2))
    engine.progress.mark()
    assert engine.progress.stalled_s == 0
    monkeypatch.setattr(engine.progress, "mark", lambda: None)
    clock.now += 1000
    engine.step()
    # the kernels have counted work
    assert engine.progress.stalled_s == 0
    clock.now += 10
    assert engine.progress.stalled_s == 10


def test_a_hang_is_noticed_within_five_seconds():
    assert SupervisionOptions().stall_timeout_s + HEARTBEAT_S + WATCH_EVERY_S <= 5
