"""Tests of one replica's part in changes of the row patches."""

import asyncio
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError
from server.http.errors import ApiError
from server.replicas.fleet_member import FleetLostError, FleetMember
from server.replicas.patch_fleet import Order, Outcome, Refusal


class Patches(dict):
    """``ServedPatches``: content hashes by name; the name ``bad`` is refused."""

    def of_key(self, key):
        return [self.served(name) for name in self]

    def served(self, name):
        return SimpleNamespace(name=name, summary=SimpleNamespace(content_hash=self[name]))

    async def load(self, name):
        if name == "bad":
            raise ApiError(400, "name: bad", param="name")
        self[name] = f"hash of {name}"
        return self.served(name)

    async def unload(self, name):
        del self[name]


class Fleet:
    """A fleet with orders to give."""

    def __init__(self, changes=None, orders=(), answer=None):
        self.changes, self.orders, self.answer = changes or {}, list(orders), answer
        self.reports, self.joined, self.left = [], [], asyncio.Event()
        self.done = asyncio.Event()

    async def join(self, held=None):
        self.joined.append(held)
        return self.changes

    async def leave(self):
        self.left.set()

    async def next_order(self):
        if not self.orders:
            self.done.set()
            await asyncio.Event().wait()
        order = self.orders.pop(0)
        if isinstance(order, Exception):
            raise order
        return order

    async def report(self, number, outcome):
        self.reports.append((number, outcome))

    async def load(self, name):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    unload = load


def followed(patches, fleet):
    """Let a member join, carry out all orders and leave."""

    async def run():
        member = FleetMember(patches, fleet)
        await member.join()
        await fleet.done.wait()
        await member.leave()
        assert fleet.left.is_set()

    asyncio.run(asyncio.wait_for(run(), 60))
    return patches


def test_a_replica_that_joins_makes_the_changes_of_the_others():
    changes = {"law": "hash of law", "old": None, "never": None}
    assert followed(Patches(old="1", kept="2"), Fleet(changes)).keys() == {"law", "kept"}


def test_another_content_under_the_same_name_is_refused():
    with pytest.raises(ConfigError, match="patch: law: other replicas have another content"):
        followed(Patches(), Fleet({"law": "another"}))


def test_orders_are_carried_out_and_reported():
    orders = [Order(1, "load", "law"), Order(2, "load", "bad"), Order(3, "unload", "law")]
    fleet = Fleet(orders=orders)
    assert not followed(Patches(), fleet)
    refused = Refusal.of(ApiError(400, "name: bad", param="name"))
    hashed = Outcome("hash of law")
    assert fleet.reports == [(1, hashed), (2, Outcome(refusal=refused)), (3, hashed)]


def test_a_replica_joins_a_new_fleet_with_what_it_has(monkeypatch):
    monkeypatch.setattr("server.replicas.fleet_member._PAUSE_S", 0)
    fleet = Fleet(orders=[FleetLostError("gone"), None, Order(1, "load", "law")])
    followed(Patches(kept="2"), fleet)
    assert fleet.joined == [None, {"kept": "2"}] and len(fleet.reports) == 1


@pytest.mark.parametrize("change", ["load", "unload"])
def test_the_answer_of_a_change_is_that_of_all_replicas(change):
    def changed(answer):
        return asyncio.run(getattr(FleetMember(Patches(), Fleet(answer=answer)), change)("law"))

    assert changed(None) is None
    with pytest.raises(ApiError, match="name: bad") as raised:
        changed(Refusal.of(ApiError(400, "name: bad", param="name")))
    assert raised.value.status == 400
    with pytest.raises(ApiError, match="cannot agree") as raised:
        changed(FleetLostError("gone"))
    assert raised.value.status == 503
