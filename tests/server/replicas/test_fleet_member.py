"""Tests of one replica's part in changes of the row patches."""

import asyncio
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError
from server.http.errors import ApiError
from server.replicas.fleet_member import FleetLostError, FleetMember
from server.replicas.patch_orders import Held, Order, Outcome, Refusal


class Patches(dict):
    """``ServedPatches``: content hashes by name; ``bad`` is refused, and ``broken`` fails."""

    def of_key(self, key):
        return [self.served(name) for name in self]

    def served(self, name):
        return SimpleNamespace(name=name, summary=SimpleNamespace(content_hash=self[name]))

    async def load(self, name):
        if name == "bad":
            raise ApiError(400, "name: bad", param="name")
        if name == "broken":
            raise KeyError(name)
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

    async def join(self, held):
        self.joined.append(held)
        return self.changes.pop(0) if isinstance(self.changes, list) else self.changes

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
        member = FleetMember(patches, fleet, {"kept": "/kept"})
        await member.join()
        await fleet.done.wait()
        await member.leave()
        assert not member.is_lost
        assert fleet.left.is_set()

    asyncio.run(asyncio.wait_for(run(), 60))
    return patches


def test_a_replica_that_joins_makes_the_changes_of_the_others():
    changes = {"law": "hash of law", "old": None, "never": None}
    assert followed(Patches(old="1", kept="2"), Fleet(changes)).keys() == {"law", "kept"}


def test_another_content_under_the_same_name_is_refused():
    fleet = Fleet({"law": "another"})
    with pytest.raises(ConfigError, match="patch: law: other replicas have another content"):
        followed(Patches(), fleet)
    assert fleet.left.is_set()


def test_orders_are_carried_out_and_reported():
    orders = [Order(1, "load", "law"), Order(2, "load", "bad"), Order(3, "unload", "law")]
    fleet = Fleet(orders=orders)
    assert not followed(Patches(), fleet)
    refused = Refusal.of(ApiError(400, "name: bad", param="name"))
    hashed = Outcome("hash of law")
    assert fleet.reports == [(1, hashed), (2, Outcome(refusal=refused)), (3, hashed)]


def test_a_failure_of_any_kind_is_reported(caplog):
    fleet = Fleet(orders=[Order(1, "load", "broken"), Order(2, "load", "law")])
    assert followed(Patches(), fleet).keys() == {"law"}
    (_, failed), (_, loaded) = fleet.reports
    assert failed.refusal.status == 500 and loaded.refusal is None
    assert "patch broken: the load failed" in caplog.text


def test_only_what_was_done_is_taken_back():
    orders = [Order(1, "load", "bad"), Order(2, "unload", "law", undoes=1)]
    orders += [Order(3, "load", "med"), Order(4, "unload", "med", undoes=3)]
    fleet = Fleet({"law": "hash of law"}, orders)
    assert followed(Patches(), fleet).keys() == {"law"}
    assert [outcome for _, outcome in fleet.reports[1:]] == [
        Outcome(),
        Outcome("hash of med"),
        Outcome("hash of med"),
    ]


@pytest.mark.parametrize("held", [{"law": "other"}, {"law": "hash of law", "bad": "1"}])
def test_a_replica_that_cannot_take_a_change_back_is_lost(held):
    name = "bad" if "bad" in held else "law"
    orders = [Order(1, "unload", name), Order(2, "load", name, undoes=1)]
    fleet = Fleet(orders=orders)

    async def run():
        member = FleetMember(Patches(held), fleet, {})
        await member.join()
        await asyncio.wait([member._work])
        return member.is_lost

    assert asyncio.run(asyncio.wait_for(run(), 60))
    assert fleet.reports[-1][1].refusal.status in (400, 500)


def test_a_replica_joins_again_until_it_has_followed(monkeypatch):
    monkeypatch.setattr("server.replicas.fleet_member._PAUSE_S", 0)
    changes = [{}, {"bad": "1"}, {"law": "hash of law", "half": None}]
    fleet = Fleet(changes, [FleetLostError("gone"), Order(1, "load", "med")])
    assert followed(Patches(kept="2", half="3"), fleet).keys() == {"kept", "law", "med"}
    assert fleet.joined == [Held({"kept": "/kept"}, {"kept": "2", "half": "3"})] * 3
    assert len(fleet.reports) == 1


def test_a_replica_is_told_to_join_again():
    fleet = Fleet(orders=[None, Order(1, "load", "law")])
    followed(Patches(kept="2"), fleet)
    assert len(fleet.joined) == 2 and len(fleet.reports) == 1


@pytest.mark.parametrize("change", ["load", "unload"])
def test_the_answer_of_a_change_is_that_of_all_replicas(change):
    def changed(answer):
        return asyncio.run(getattr(FleetMember(Patches(), Fleet(answer=answer), {}), change)("law"))

    assert changed(None) is None
    with pytest.raises(ApiError, match="name: bad") as raised:
        changed(Refusal.of(ApiError(400, "name: bad", param="name")))
    assert raised.value.status == 400
    with pytest.raises(ApiError, match="cannot agree") as raised:
        changed(FleetLostError("gone"))
    assert raised.value.status == 503
