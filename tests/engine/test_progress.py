"""What tells a slow step from one that hangs."""

from engine import progress
from engine.config import EngineConfig
from engine.process import HEARTBEAT_S
from engine.progress import Progress
from server.config import SupervisionOptions
from server.engine_client import WATCH_EVERY_S
from tests.models import eager, engine_of, greedy, random_model, tiny_config


def test_a_mark_begins_anew_and_rest_is_no_stall(monkeypatch):
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


def test_a_step_gets_on_by_its_layers_its_logits_and_its_tokens(monkeypatch):
    at = engine_of(
        random_model(tiny_config(num_layers=3)), EngineConfig(kv_cache_gib=0.001), make=eager
    )
    at.add(greedy("a", [1, 2, 3], 2))
    marks = []
    monkeypatch.setattr(at.progress, "mark", lambda: marks.append(1))
    at.warm_up()
    assert len(marks) == 3 + 2


def test_a_hang_is_noticed_within_five_seconds():
    assert SupervisionOptions().stall_timeout_s + HEARTBEAT_S + WATCH_EVERY_S <= 5
