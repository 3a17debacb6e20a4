"""Tests of changes of the row patches of all replicas."""

import asyncio

import pytest

from server.http.errors import ApiError
from server.replicas.patch_fleet import Outcome, PatchFleet, Refusal

REFUSED = Refusal.of(ApiError(400, "name: bad", param="name"))


class Member:
    """A replica with patches; ``answers`` replaces its answer to an action."""

    def __init__(self, fleet, name, **answers):
        self.fleet, self.name, self.answers = fleet, name, answers
        self.patches = set()

    async def start(self, *initial):
        self.patches = set(initial)
        changes = await self.fleet.join(self.name, initial)
        for name, content in changes.items():
            if content is None:
                self.patches.discard(name)
            else:
                self.patches.add(name)
        self.work = asyncio.create_task(self.obey())
        return self

    async def obey(self):
        while (order := await self.fleet.next_order(self.name)) is not None:
            answer = self.answers.get(order.action, Outcome(f"hash of {order.name}"))
            if answer is None:
                self.fleet.leave(self.name)  # it dies
                return
            if answer == "silent":
                continue
            if answer.refusal is None:
                change = self.patches.add if order.action == "load" else self.patches.discard
                change(order.name)
            self.fleet.report(self.name, order.number, answer)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 60))


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
        await Member(fleet, "b", load="silent").start()
        refusal = await fleet.load("law")
        assert refusal is not None and refusal.status == 504
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


def test_a_new_fleet_learns_the_changes_from_a_replica():
    async def scenario():
        fleet = PatchFleet()
        await fleet.join("a", ["first", "second"], {"second": "2", "later": "3"})
        assert await fleet.next_order("unknown") is None
        return await fleet.join("b", ["first", "second"])

    assert run(scenario) == {"later": "3", "first": None}


def test_a_refusal_is_the_error_that_it_was_made_of():
    error = ApiError(503, "later", "server_error", "name", "busy", {"Retry-After": "5"})
    copy = Refusal.of(error).error()
    assert (copy.status, copy.body, copy.headers) == (error.status, error.body, error.headers)
