"""The engine process ends its engine's ranks however it ends."""

import gc
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError
from engine.messages import EngineRefused
from server import engine_entry


@pytest.fixture
def start(monkeypatch):
    """Calls ``main`` with an engine whose start and run are replaced; returns what happened."""
    for name in ("keep_freed_memory", "set_up_logs", "spread_over_nodes"):
        monkeypatch.setattr(engine_entry, name, lambda *arguments: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)

    def call(warm_up, run):
        events = []
        engine = SimpleNamespace(
            warm_up=warm_up,
            patches=SimpleNamespace(prepare=lambda: None),
            close=lambda: events.append("closed"),
        )
        monkeypatch.setattr(engine_entry, "build_engine", lambda *arguments, **more: engine)
        monkeypatch.setattr(engine_entry, "run_engine", lambda *arguments: run())
        connection = SimpleNamespace(send=events.append)
        try:
            engine_entry.main(connection, SimpleNamespace(log_format="text"))
        except ZeroDivisionError:
            events.append("failed")
        return events

    return call


def test_the_engine_is_closed_when_it_ends_and_when_it_fails(start):
    assert start(lambda: None, lambda: None) == ["closed"]
    assert start(lambda: None, lambda: 1 / 0) == ["closed", "failed"]


def test_an_engine_that_cannot_warm_up_says_why_and_is_closed(start):
    def warm_up():
        raise ConfigError("max_num_seqs: is too large")

    found = start(warm_up, lambda: 1 / 0)
    assert found == [EngineRefused("max_num_seqs: is too large"), "closed"]
    assert start(lambda: 1 / 0, lambda: None) == ["closed", "failed"]
