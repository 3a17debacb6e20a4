"""Tests of changes of the row patches of all replicas."""

import asyncio
import itertools

import pytest

from server.http.errors import ApiError
from server.replicas.patch_fleet import PatchFleet
from server.replicas.patch_orders import Held, Outcome, Refusal
from tests.server.replicas.fleet_double import REFUSED, Member, held, run


def test_a_patch_is_loaded_in_all_and_in_those_that_come_later():
    async def scenario():
        fleet = PatchFleet()
        members = [await Member(fleet, name).start() for name in "ab"]
        assert await fleet.load("law") is None
        members.append(await Member(fleet, "c").start())
        return [member.patches for member in members]

    assert run(scenario) == [{"law"}] * 3


@pytest.mark.parametrize(
    ("answer", "status"), [(Outcome(refusal=REFUSED), 400), (Outcome("other"), 500)]
)
def test_if_one_replica_fails_none_has_the_patch(answer, status):
    async def scenario():
        fleet = PatchFleet()
        members = [await Member(fleet, "a").start(), await Member(fleet, "b", load=answer).start()]
        refusal = await fleet.load("law")
        assert refusal is not None and refusal.error().status == status
        assert fleet.changes == {}
        return [member.patches for member in members]

    assert run(scenario) == [set(), set()]


def test_a_replica_that_dies_during_a_change_does_not_count():
    async def scenario():
        fleet = PatchFleet()
        member = await Member(fleet, "a").start()
        await Member(fleet, "b", load=None).start()
        assert await fleet.load("law") is None
        assert set(fleet.members) == {"a"}
        return member.patches

    assert run(scenario) == {"law"}


def test_a_replica_that_does_not_answer_in_time_fails_the_change():
    async def scenario():
        fleet = PatchFleet(order_timeout_s=0.01)
        member = await Member(fleet, "a").start()
        late = await Member(fleet, "b", load="silent", unload="silent").start()
        refusal = await fleet.load("law")
        assert refusal is not None and refusal.status == 504
        # it does not take the change back either, so it must join again
        assert set(fleet.members) == {"a"}
        await late.work
        return member.patches

    assert run(scenario) == set()


def test_a_fleet_without_replicas_refuses():
    async def scenario():
        fleet = PatchFleet()
        return (await fleet.load("law")).status, (await fleet.unload("law")).status

    assert run(scenario) == (503, 503)


def test_a_patch_of_the_start_stays_removed():
    async def scenario():
        fleet = PatchFleet()
        members = [await Member(fleet, name).start("law", "med") for name in "ab"]
        assert await fleet.unload("law") is None
        members.append(await Member(fleet, "c").start("law", "med"))
        assert fleet.changes == {"law": None}
        assert await fleet.load("law") is None and await fleet.unload("law") is None
        return [member.patches for member in members]

    assert run(scenario) == [{"med"}] * 3


def test_a_removal_that_one_replica_refuses_is_taken_back():
    async def scenario():
        fleet = PatchFleet()
        members = [await Member(fleet, "a").start("law")]
        members.append(await Member(fleet, "b", unload=Outcome(refusal=REFUSED)).start("law"))
        assert (await fleet.unload("law")).status == 400
        return [member.patches for member in members]

    assert run(scenario) == [{"law"}] * 2


@pytest.mark.parametrize("is_missing_everywhere", [False, True])
def test_a_replica_that_lost_the_patch_does_not_hinder_its_removal(is_missing_everywhere):
    missing = Outcome(refusal=Refusal.of(ApiError(404, "name: no patch", param="name")))

    async def scenario():
        fleet = PatchFleet()
        await Member(fleet, "a", unload=missing).start()
        await Member(fleet, "b", **{"unload": missing} if is_missing_everywhere else {}).start()
        return await fleet.unload("law")

    refusal = run(scenario)
    assert refusal == missing.refusal if is_missing_everywhere else refusal is None


def test_a_replica_that_leaves_or_joins_again_is_not_waited_for():
    async def scenario():
        fleet = PatchFleet()
        await fleet.join("a", held())
        order = asyncio.create_task(fleet.next_order("a"))
        await asyncio.sleep(0)
        fleet.leave("a")
        assert await order is None and await fleet.next_order("a") is None
        await fleet.join("a", held())
        member = await Member(fleet, "b").start()
        change = asyncio.create_task(fleet.load("law"))
        await asyncio.sleep(0)
        assert await fleet.join("a", held()) == {"law": "hash of law"}
        assert await change is None
        return member.patches

    assert run(scenario) == {"law"}


def test_a_replica_without_the_patch_of_its_start_does_not_change_the_others():
    async def scenario():
        fleet = PatchFleet()
        await Member(fleet, "a").start("law")
        lost = await fleet.join("b", Held({"law": "/law"}, {}))
        return lost, fleet.changes, await fleet.join("c", held("law"))

    assert run(scenario) == ({}, {}, {"law": "hash of law"})


def test_equal_folders_must_have_equal_contents():
    async def scenario():
        fleet = PatchFleet()
        await fleet.join("a", Held({"law": "/law"}, {"law": "1"}))
        same = await fleet.join("b", Held({"law": "/law"}, {"law": "2"}))
        return same, await fleet.join("c", Held({"law": "/new"}, {"law": "2"}))

    assert run(scenario) == ({"law": "1"}, {"law": "2"})


def test_a_late_replica_keeps_what_a_second_order_did_not_load():
    async def scenario():
        fleet = PatchFleet()
        members = [await Member(fleet, name).start() for name in "ab"]
        assert await fleet.load("law") is None
        busy = Outcome(refusal=Refusal.of(ApiError(504, "late")))
        for member in members:
            member.answers["load"] = busy
        assert (await fleet.load("law")).status == 504
        return [member.patches for member in members]

    assert run(scenario) == [{"law"}] * 2


def test_a_replica_that_cannot_take_a_change_back_leaves(caplog):
    async def scenario():
        fleet = PatchFleet()
        members = [await Member(fleet, "a", unload=Outcome(refusal=REFUSED)).start()]
        members.append(await Member(fleet, "b", load=Outcome(refusal=REFUSED)).start())
        assert (await fleet.load("law")).status == 400
        await members[0].work
        return set(fleet.members)

    assert run(scenario) == {"b"}
    assert "replica a did not take back a change: name: bad" in caplog.text


def failing_keep(call):
    """Fails at this call only."""
    numbers = itertools.count(1)

    async def keep(state):
        if next(numbers) == call:
            raise OSError("no store")

    return keep


def test_a_load_that_cannot_be_stored_is_taken_back():
    async def scenario():
        fleet = PatchFleet(keep=failing_keep(2))  # the first one is the join
        member = await Member(fleet, "a").start()
        with pytest.raises(OSError, match="no store"):
            await fleet.load("law")
        assert (fleet.changes, member.patches) == ({}, set())
        assert await fleet.load("law") is None
        return fleet.changes, member.patches

    assert run(scenario) == ({"law": "hash of law"}, {"law"})


def test_a_refused_removal_is_taken_back_even_if_that_cannot_be_stored():
    async def scenario():
        fleet = PatchFleet(keep=failing_keep(4))  # two joins and the removal come first
        members = [await Member(fleet, "a").start("law")]
        members.append(await Member(fleet, "b", unload=Outcome(refusal=REFUSED)).start("law"))
        with pytest.raises(OSError, match="no store"):
            await fleet.unload("law")
        # a replica that joins now has what the others have
        members.append(await Member(fleet, "c").start("law"))
        return fleet.changes, [member.patches for member in members]

    assert run(scenario) == ({}, [{"law"}] * 3)


def test_a_refusal_is_the_error_that_it_was_made_of():
    error = ApiError(503, "later", "server_error", "name", "busy", {"Retry-After": "5"})
    copy = Refusal.of(error).error()
    assert (copy.status, copy.body, copy.headers) == (error.status, error.body, error.headers)
