"""Replicas that join during changes, and a fleet that takes the place of one that has died."""

import asyncio

import pytest

from server.replicas.patch_fleet import FleetState, PatchFleet
from server.replicas.patch_orders import Held, Outcome
from tests.server.replicas.fleet_double import REFUSED, Member, held, run


def test_a_new_fleet_knows_the_changes_and_ends_those_that_were_not_finished():
    kept = []

    async def keep(state):
        kept.append(state)

    async def scenario():
        fleet = PatchFleet(FleetState({"later": "3", "first": None}), keep)
        wanted = await fleet.join("a", Held({"first": "/x", "lost": "/y"}, {"half": "4"}))
        assert wanted == {"later": "3", "first": None, "half": None}
        await Member(fleet, "a").start("first")
        assert await fleet.load("law") is None and await fleet.unload("later") is None

    run(scenario)
    loaded = {"later": "3", "first": None, "law": "hash of law"}
    changes = [{"later": "3", "first": None}] * 2 + [loaded, {"first": None, "law": "hash of law"}]
    assert kept == [FleetState(one, ("a",)) for one in changes]


def test_a_new_fleet_makes_no_change_before_its_replicas_have_joined_again():
    """A replica that lacks the patch or refuses it must be asked, too."""

    async def scenario():
        fleet = PatchFleet(FleetState({}, ("a", "b")))
        first = await Member(fleet, "a").start()
        change = asyncio.create_task(fleet.load("bad"))
        await asyncio.sleep(0)
        fleet.leave("b")  # it joins again, and clears up before that
        second = await Member(fleet, "b", load=Outcome(refusal=REFUSED)).start()
        assert await change == REFUSED
        return first.patches, second.patches

    assert run(scenario) == (set(), set())


def test_a_new_fleet_does_not_wait_for_ever_for_replicas_that_have_died():
    kept = []

    async def keep(state):
        kept.append(state)

    async def scenario():
        fleet = PatchFleet(FleetState({}, ("a", "dead")), keep, rejoin_timeout_s=0.01)
        member = await Member(fleet, "a").start()
        assert await fleet.load("law") is None and await fleet.unload("law") is None
        return member.patches

    assert run(scenario) == set()
    assert [state.replicas for state in kept] == [("a", "dead"), ("a",), ("a",)]


def test_once_one_change_has_waited_in_vain_the_others_do_not_wait():
    async def scenario():
        fleet = PatchFleet(FleetState({}, ("a", "dead")), rejoin_timeout_s=0.01)
        member = await Member(fleet, "a").start()
        first = asyncio.create_task(fleet.load("law"))
        await asyncio.sleep(0)
        fleet._rejoin_timeout_s = 600
        assert await asyncio.gather(first, fleet.load("tax")) == [None, None]
        return member.patches

    assert run(scenario) == {"law", "tax"}


def test_a_replica_that_is_joining_is_stored_with_a_change():
    """A fleet that begins then must wait for it."""
    kept = []

    async def keep(state):
        kept.append(state)

    async def scenario():
        fleet = PatchFleet(keep=keep)
        await Member(fleet, "a").start()
        change = asyncio.create_task(fleet.load("law"))
        await asyncio.sleep(0)
        await Member(fleet, "b").start()
        return await change

    assert run(scenario) is None
    law = {"law": "hash of law"}
    assert kept == [FleetState({}, ("a",)), *[FleetState(law, ("a", "b"))] * 2]


def test_a_replica_that_joins_during_a_change_has_it_and_is_not_asked():
    async def scenario():
        fleet = PatchFleet()
        first = await Member(fleet, "a").start()
        order = asyncio.create_task(fleet.load("law"))
        await asyncio.sleep(0)
        late = await Member(fleet, "b", load=Outcome(refusal=REFUSED)).start()
        assert await order is None
        return first.patches, late.patches

    assert run(scenario) == ({"law"}, {"law"})


def test_a_replica_that_joins_during_a_change_that_fails_has_none_of_it():
    async def scenario():
        fleet = PatchFleet()
        members = [await Member(fleet, "a").start()]
        members.append(await Member(fleet, "b", load=Outcome(refusal=REFUSED)).start())
        change = asyncio.create_task(fleet.load("law"))
        await asyncio.sleep(0)
        members.append(await Member(fleet, "c").start())
        assert await change == REFUSED
        return [member.patches for member in members]

    assert run(scenario) == [set()] * 3


def test_a_replica_that_dies_while_it_joins_is_no_member():
    """It would never answer: every later change would wait for it until the time limit."""

    async def scenario():
        fleet = PatchFleet()
        await Member(fleet, "a", load="silent").start()
        change = asyncio.create_task(fleet.load("law"))
        await asyncio.sleep(0)
        joins = [asyncio.create_task(fleet.join("b", held())) for _ in range(2)]
        await asyncio.sleep(0)
        fleet.leave("b")
        fleet.leave("a")
        await asyncio.gather(change, *joins)
        return set(fleet.members)

    assert run(scenario) == set()


def test_a_replica_whose_changes_cannot_be_stored_is_no_member():
    async def fail(state):
        raise OSError("no store")

    async def scenario():
        fleet = PatchFleet(keep=fail)
        with pytest.raises(OSError, match="no store"):
            await fleet.join("a", held())
        return set(fleet.members), fleet._joining

    assert run(scenario) == (set(), {})
