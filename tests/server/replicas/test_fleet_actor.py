"""Tests of the actor of row patches, without a cluster; test_with_ray.py runs it in one."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from server.replicas.patch_orders import Held, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # it imports Ray
MODULE = "server.replicas.fleet_actor"


async def ready() -> None:
    """The answer of a replica that runs."""


@pytest.fixture
def actor_of(monkeypatch):
    """Makes the actor; ``store`` is Ray's store."""
    from server.replicas.fleet_actor import FleetActor

    def make(store):
        kv = f"{MODULE}.internal_kv._internal_kv"
        monkeypatch.setattr(f"{kv}_get", lambda key, namespace: store.get(key))
        monkeypatch.setattr(f"{kv}_put", lambda key, text, _, namespace: store.update({key: text}))
        monkeypatch.setattr(f"{kv}_del", lambda key, namespace: store.pop(key))
        return FleetActor("app")

    return make


def test_a_change_goes_on_if_its_client_leaves_and_is_kept(actor_of):
    async def run(store):
        actor = actor_of(store)
        handle = SimpleNamespace(__ray_ready__=SimpleNamespace(remote=ready))
        await actor.join("a", handle, Held({}, {}))
        change = asyncio.create_task(actor.load("law"))
        order = await actor.next_order("a")
        change.cancel()
        await asyncio.gather(change, return_exceptions=True)
        await actor.report("a", order.number, Outcome("1"))
        return await actor.join("b", handle, Held({}, {}))

    store = {}
    assert asyncio.run(asyncio.wait_for(run(store), 60)) == {"law": "1"}
    (text,) = store.values()
    assert json.loads(text) == {"changes": {"law": "1"}, "replicas": ["a", "b"]}


def test_the_actor_starts_from_what_it_kept(actor_of):
    async def run(store):
        fleet = actor_of(store)._fleet
        return fleet.changes, fleet._missing

    store = {"changes of app": '{"changes": {"law": null}, "replicas": ["a"]}'}
    assert asyncio.run(run(store)) == ({"law": None}, {"a"})


def test_the_actor_starts_without_changes_of_an_unknown_format(actor_of, caplog):
    async def run(store):
        return actor_of(store)._fleet.changes

    assert asyncio.run(run({"changes of app": '{"law": "1"}'})) == {}
    assert "'changes of app' in Ray's store has an unknown format" in caplog.text


def test_the_actor_ends_with_its_application_and_not_before(actor_of, monkeypatch, caplog):
    async def run(store):
        killed = asyncio.Queue()
        answers = [RuntimeError("no controller"), ["app"], []]

        def status():
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(applications=answer)

        context = SimpleNamespace(current_actor="this")
        monkeypatch.setattr(f"{MODULE}._IDLE_S", 0)
        monkeypatch.setattr(f"{MODULE}.serve.status", status)
        monkeypatch.setattr(f"{MODULE}.ray.get_runtime_context", lambda: context)
        monkeypatch.setattr(f"{MODULE}.ray.kill", killed.put_nowait)
        actor_of(store)
        return await killed.get(), answers

    store = {"changes of app": '{"changes": {}, "replicas": []}'}
    assert asyncio.run(asyncio.wait_for(run(store), 60)) == ("this", [])
    assert not store and "unknown now: no controller" in caplog.text
