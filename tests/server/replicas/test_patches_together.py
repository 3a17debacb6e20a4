"""Several replicas' own patches and their limits, joined by one fleet, without Ray or engines."""

import asyncio

import pytest

from engine.errors import PatchBusyError, PatchFailedError, PatchRefusedError
from engine.process import EngineLostError
from engine.request import PatchSummary
from server.http.errors import ApiError
from server.http.metrics import Metrics
from server.http.served_patches import ServedPatches
from server.patch_options import PatchOptions
from server.replicas.fleet_member import FleetLostError, FleetMember
from server.replicas.patch_fleet import PatchFleet
from tests.server.replicas.fleet_double import run

SIZE = 100


class EngineDouble:
    """An engine client with some memory for patches, of which each takes 100 bytes.

    ``error`` is raised by the next load; a load waits for ``may_load``.
    """

    def __init__(self, memory=10 * SIZE):
        self.memory, self.error, self.loaded = memory, None, []
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def load_patch(self, folder):
        await self.may_load.wait()
        if self.error is not None:
            raise self.error
        if (len(self.loaded) + 1) * SIZE > self.memory:
            raise PatchRefusedError(f"--patch-memory-gib: {self.memory} bytes are not enough")
        content_hash = folder.name * 8
        self.loaded.append(content_hash)
        return PatchSummary(content_hash, 7, SIZE, {"memory.table": 7})

    def unload_patch(self, content_hash, folder):
        self.loaded.remove(content_hash)


class Connection:
    """The fleet as one replica sees it. ``fleets`` holds the one that runs; none: it has died."""

    def __init__(self, fleets, name):
        self.fleets, self.name = fleets, name

    @property
    def fleet(self):
        if not self.fleets:
            raise FleetLostError("the actor died")
        return self.fleets[-1]

    async def join(self, held):
        return await self.fleet.join(self.name, held)

    async def leave(self):
        for fleet in self.fleets:
            fleet.leave(self.name)

    async def next_order(self):
        fleet = self.fleet
        order = await fleet.next_order(self.name)
        if fleet not in self.fleets:
            raise FleetLostError("the actor died")
        return order

    async def report(self, number, outcome):
        self.fleet.report(self.name, number, outcome)

    async def load(self, name):
        return await self.fleet.load(name)

    async def unload(self, name):
        return await self.fleet.unload(name)


class Replicas:
    """Replicas with a folder of patches, and the fleet that joins them."""

    def __init__(self, folder):
        for name in ("law", "med", "tax"):
            (folder / name).mkdir()
        self.options = PatchOptions(patch_dir=str(folder))
        self.fleets, self.members, self.engines, self.state = [], [], [], []
        self.fleets.append(PatchFleet(keep=self.keep))

    async def keep(self, state):
        self.state.append(state)

    async def add(self, max_patches=10, memory=10 * SIZE):
        engine = EngineDouble(memory)
        served = ServedPatches(engine, Metrics("mock").patches, self.options, max_patches)
        member = FleetMember(served, Connection(self.fleets, str(len(self.members))), {})
        self.engines.append(engine)
        self.members.append(member)
        await member.join()
        return engine

    def restart_fleet(self):
        """The fleet's process dies, and Ray starts another one from the stored state."""
        dead = self.fleets.pop()
        for name in dead.members:
            dead.leave(name)  # calls that wait for it end
        self.fleets.append(PatchFleet(self.state[-1], self.keep))

    @property
    def loaded(self):
        return [sorted(one[:3] for one in engine.loaded) for engine in self.engines]

    async def stop(self):
        for member in self.members:
            await member.leave()


@pytest.fixture
def scenario(tmp_path, monkeypatch):
    """Runs a coroutine function with replicas, which leave at its end."""
    monkeypatch.setattr("server.replicas.fleet_member._PAUSE_S", 0)

    def run_one(work):
        async def whole():
            replicas = Replicas(tmp_path)
            try:
                return await work(replicas)
            finally:
                await replicas.stop()

        return run(whole)

    return run_one


async def refusal(change):
    """The status and the message of a change that is refused."""
    with pytest.raises(ApiError) as raised:
        await change
    return raised.value.status, raised.value.body["error"]["message"]


@pytest.mark.parametrize("asked", [0, 1], ids=["client of another", "client of that one"])
@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"memory": SIZE}, "--patch-memory-gib"), ({"max_patches": 1}, "--max-patches: 1 row")],
)
def test_a_patch_that_one_replica_has_no_place_for_is_loaded_on_none(
    scenario, limits, reason, asked
):
    async def work(replicas):
        for one in ({}, limits, {}):
            await replicas.add(**one)
        await replicas.members[0].load("law")
        status, message = await refusal(replicas.members[asked].load("med"))
        assert status == 400 and reason in message and "patch 'med'" in message
        before = replicas.loaded
        # the place is free again, and the next patch fits
        await replicas.members[2].unload("law")
        await replicas.members[asked].load("med")
        return before, replicas.loaded

    assert scenario(work) == ([["law"]] * 3, [["med"]] * 3)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PatchBusyError("removed patches take the memory"), 503),
        (PatchFailedError("the disk is lost"), 500),
        (EngineLostError("the engine is not running"), 503),
    ],
)
def test_the_client_gets_the_error_of_the_replica_that_fails(scenario, error, status):
    async def work(replicas):
        await replicas.add()
        engine = await replicas.add()
        engine.error = error
        found, _ = await refusal(replicas.members[0].load("law"))
        assert found == status and replicas.loaded == [[], []]
        engine.error = None
        await replicas.members[1].load("law")
        return replicas.loaded

    assert scenario(work) == [["law"], ["law"]]


def test_changes_of_two_ingresses_are_made_one_after_another(scenario):
    async def work(replicas):
        for _ in range(2):
            await replicas.add()
        first, second = replicas.members
        results = await asyncio.gather(
            first.load("law"), second.load("law"), first.load("med"), return_exceptions=True
        )
        assert [getattr(one, "status", None) for one in results] == [None, 409, None]
        results = await asyncio.gather(
            first.unload("law"), second.load("law"), second.unload("med")
        )
        assert results == [None] * 3
        return replicas.loaded

    assert scenario(work) == [["law"]] * 2


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_replica_that_joins_while_a_patch_is_loaded_agrees_with_the_others(scenario, is_refused):
    async def work(replicas):
        for _ in range(2):
            await replicas.add()
        slow = replicas.engines[0]
        slow.may_load.clear()
        if is_refused:
            slow.error = PatchRefusedError("rows out of range")
        change = asyncio.create_task(replicas.members[1].load("law"))
        while not replicas.engines[1].loaded:
            await asyncio.sleep(0)
        join = asyncio.create_task(replicas.add())
        await asyncio.sleep(0)
        assert not join.done() and len(replicas.engines) == 3
        slow.may_load.set()
        await asyncio.gather(change, return_exceptions=is_refused)
        await join
        return replicas.loaded

    assert scenario(work) == [[] if is_refused else ["law"]] * 3


def test_a_replica_that_cannot_load_the_patches_of_the_others_does_not_join(scenario):
    async def work(replicas):
        await replicas.add()
        await replicas.members[0].load("law")
        assert (await refusal(replicas.add(memory=0)))[0] == 400
        del replicas.members[1], replicas.engines[1]
        await replicas.members[0].load("med")  # it is not asked
        return replicas.loaded

    assert scenario(work) == [["law", "med"]]


def test_a_fleet_that_returns_completes_or_takes_back_what_was_begun(scenario):
    async def work(replicas):
        for _ in range(2):
            await replicas.add()
        first, second = replicas.members
        await first.load("law")
        slow = replicas.engines[1]
        slow.may_load.clear()
        change = asyncio.create_task(first.load("med"))
        while len(replicas.engines[0].loaded) < 2:
            await asyncio.sleep(0)
        replicas.restart_fleet()
        change.cancel()  # with the actor that made it
        slow.may_load.set()
        # both have joined again before the next change: they have no half of the other one
        await second.load("tax")
        await asyncio.gather(change, return_exceptions=True)
        return replicas.loaded

    assert scenario(work) == [["law", "tax"]] * 2


def test_without_a_fleet_changes_fail_and_patches_stay(scenario):
    async def work(replicas):
        await replicas.add()
        member = replicas.members[0]
        await member.load("law")
        dead = replicas.fleets.pop()
        dead.leave("0")
        status, message = await refusal(member.load("med"))
        assert status == 503 and "cannot agree" in message and replicas.loaded == [["law"]]
        replicas.fleets.append(PatchFleet(replicas.state[-1], replicas.keep))
        await member.load("med")
        return replicas.loaded

    assert scenario(work) == [["law", "med"]]
